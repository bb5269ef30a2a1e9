"""A task: one column of the published table, with its data, prompts, post-processing and metric.

The prompts and the scoring are UltraEval's (OpenBMB/UltraEval, commit 5d967b4e), which scored the
published table. Where its text leaves a choice open, a comment at that place names ours. One
thing differs for all tasks: UltraEval draws examples unseeded from the evaluation set; ours come
from `examples.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..engine.sampling import Sampling
from ..errors import InvalidArgumentError
from ..files.rows import Row
from .question import Doc, Question
from .scoring.metrics import smallest, total_loss

DEFAULT_SAMPLING = Sampling(temperature=0.3, top_p=0.8)
"""UltraEval's settings for most sets."""
CODE_SAMPLING = Sampling(temperature=0.1, top_p=0.95)
"""UltraEval's "v1" settings, for code and mathematics."""

DocFilter = Callable[[Mapping[str, Any]], bool]
"""Whether a document with these fields is used."""


def parquet_files(split: str) -> tuple[str, str]:
    """Patterns of a split's files in the two layouts of the hub."""
    return f"{split}*.parquet", f"{split}/*.parquet"


class DocText(NamedTuple):
    """A document as text."""

    input: str
    output: str
    """Follows `input` where the document is a few-shot example."""
    gold: str
    """The answer a correct reply is compared with."""


class MultipleChoice(NamedTuple):
    """A document whose options are continuations of a prompt."""

    prompt: str
    options: tuple[str, ...]
    right: int
    """Index of the correct option."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a data set's files are, and how a row is read."""

    repo: str
    """On the hub."""
    download: tuple[str, ...]
    """Files on the hub's parquet branch; `{subset}` stands for each subset."""
    questions: tuple[str, ...]
    """Patterns of the questions' files in a folder, best first; with `*` and `{subset}`."""
    examples: tuple[str, ...] = ()
    """Patterns of the examples' files; without any, examples are drawn from the questions."""
    parse_row: Callable[[Row], Mapping[str, Any] | None]
    """A row's fields; None drops the row. Raises DataError."""
    is_example: DocFilter | None = None
    """Which rows of the examples' files are examples; None: all."""
    subsets: tuple[str, ...] = ("",)
    """All subsets, in the official order."""
    subset_field: str = ""
    """The field with a row's subset, in a file that holds all of them."""
    id_field: str = ""
    """The field with a row's id; a row without it is numbered."""
    columns: tuple[str, ...] = ()
    """Column names of a .csv without a header."""
    cot_prompts: tuple[str, ...] = ()
    """Patterns of files with one text for a whole subset, read into each document's "cot"."""
    advice: str = ""
    """Where else the data can be downloaded."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A set of questions with its prompts, post-processing and metric."""

    name: str
    """As on the command line: "mmlu", "arc_easy"."""
    title: str
    """As in the published table: "MMLU", "ARC-E"."""
    language: str
    """The mean the task belongs to: "en" or "zh"."""
    few_shot: Mapping[str, int]
    """Number of examples in the prompt, by mode: "gen", "ppl"."""
    source: Source
    format_doc: Callable[[Doc], DocText]
    sampling: Sampling = DEFAULT_SAMPLING
    """UltraEval's; the seed is the caller's."""
    max_tokens: int = 300
    """Tokens of the longest reply."""
    description: Callable[[str], str] | None = None
    """First line of a prompt, for a subset."""
    postprocess: Callable[[str, Question], str] | None = None
    """Extracts the answer, or the program to run, from a reply; None: the reply as it is."""
    metric: Callable[[str, Question], float] | None = None
    """Scores an extracted answer; None for tasks whose replies are programs."""
    early_stop: Callable[[str, Question], bool] | None = None
    """Whether the reply so far decides its score; None: only the whole reply does."""
    multiple_choice: Callable[[Doc], MultipleChoice] | None = None
    """The document for mode "ppl"."""
    loss: Callable[[Sequence[Sequence[float]]], list[float]] = total_loss
    """ppl: the option with the smallest loss is chosen."""

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes: "gen" (generates a reply) and, for some, "ppl" (compares options)."""
        return tuple(self.few_shot)

    @property
    def needs_code(self) -> bool:
        """Whether `parse` returns a program; running it decides the score."""
        return self.metric is None

    def question(self, doc: Doc, examples: Sequence[Doc] = (), mode: str = "gen") -> Question:
        """The document as a question, after `examples`; InvalidArgumentError for another mode."""
        if mode not in self.modes:
            raise InvalidArgumentError(
                f"mode must be {' or '.join(self.modes)} for {self.name}, got {mode!r}"
            )
        text = self.format_doc(doc)
        if mode == "ppl":
            assert self.multiple_choice is not None
            prompt, options, right = self.multiple_choice(doc)
            return Question(doc=doc, prompt=prompt, gold=text.gold, options=options, right=right)
        description = self.description(doc.subset) if self.description else ""
        shown = [example.input + example.output for example in map(self.format_doc, examples)]
        prompt = "\n\n".join([*([description] if description else []), *shown, text.input])
        return Question(doc=doc, prompt=prompt, gold=text.gold)

    def parse(self, reply: str, question: Question) -> str:
        """The answer in a reply; for a code task, the program to run."""
        return self.postprocess(reply, question) if self.postprocess else reply

    def score(self, parsed: str, question: Question) -> float:
        """1.0 or 0.0; InvalidArgumentError for a code task."""
        if self.metric is None:
            raise InvalidArgumentError(
                f"{self.name} cannot score text: its programs must be run; run what parse() "
                "returned in the sandbox"
            )
        return self.metric(parsed, question)

    def choose(self, logprobs: Sequence[Sequence[float]], question: Question) -> int:
        """Index of the chosen option, from the token log probabilities of each option.

        `logprobs` cover prompt and option together, without the first token, which has none. NaN
        counts as infinitely unlikely; the first of equal options is chosen.
        """
        if len(logprobs) != len(question.options) or not logprobs:
            raise InvalidArgumentError(
                f"expected log probabilities of {len(question.options)} options, "
                f"got {len(logprobs)}; give one list for each option of a ppl question"
            )
        return smallest(self.loss(logprobs))
