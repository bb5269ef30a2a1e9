"""One column of the published table: how it is asked, read and scored.

The prompts and the scoring are UltraEval's (OpenBMB/UltraEval, commit 5d967b4e), which scored the
published table; what its text leaves open is decided where it bites, and said there. One thing
differs for all: its examples were drawn unseeded from the evaluation set, ours are in `shots.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..engine.sampling import Sampling
from ..errors import InvalidArgumentError
from ..files.rows import Row
from .question import Item, Question
from .scoring.metrics import smallest, total_loss

__all__ = ["CODE", "COT", "DEFAULT", "Ask", "Choice", "Example", "Task"]

DEFAULT = Sampling(temperature=0.3, top_p=0.8)
"""UltraEval's settings for most sets, with 300 tokens."""
CODE = Sampling(temperature=0.1, top_p=0.95)
"""Its "v1", for code and mathematics, with 300 tokens."""
COT = Sampling(temperature=0.3, top_p=0.8)
"""Those of BBH with a chain of thought, with 1024 tokens."""


class Example(NamedTuple):
    """An item written out."""

    input: str
    output: str
    """What follows `input` where the item is an example for another."""
    gold: str
    """What a right reply is compared with."""


class Choice(NamedTuple):
    """An item whose options are continuations."""

    prompt: str
    options: tuple[str, ...]
    right: int


Ask = Callable[[Item], Example]


def _as_it_is(reply: str, question: Question) -> str:
    return reply


@dataclass(frozen=True, kw_only=True)
class Task:
    """A set of questions with its prompts, post-processing and metric."""

    name: str
    """As on the command line: "mmlu", "arc_easy"."""
    title: str
    """As in the published table: "MMLU", "ARC-E"."""
    language: str
    """"en" or "zh": the mean that it belongs to."""
    shots: Mapping[str, int]
    """Examples in the prompt, by mode: "gen", "ppl"."""
    source: Source
    """Where its data is."""
    ask: Ask
    """An item as input, output and gold."""
    settings: Sampling = DEFAULT
    """UltraEval's; the seed is the caller's."""
    max_tokens: int = 300
    """Tokens that a reply may have."""
    describe: Callable[[str], str] | None = None
    """The first line of a prompt, for a subset."""
    read: Callable[[str, Question], str] = _as_it_is
    """Post-processing of a reply."""
    match: Callable[[str, Question], float] | None = None
    """The metric, of what `read` returned; None where the reply is a program."""
    enough: Callable[[str, Question], bool] | None = None
    """Whether so much of a reply decides its score; None: the whole reply does."""
    choice: Callable[[Item], Choice] | None = None
    """An item for "ppl"."""
    loss: Callable[[Sequence[Sequence[float]]], list[float]] = total_loss
    """ppl: what the chosen option has least of."""

    @property
    def modes(self) -> tuple[str, ...]:
        """How it can be asked: "gen" (a reply is read) and, for some, "ppl" (options compared)."""
        return tuple(self.shots)

    @property
    def needs_code(self) -> bool:
        """Whether `parse` returns a program that must be run; it passes or fails, never `score`."""
        return self.match is None

    def question(self, item: Item, shots: Sequence[Item] = (), mode: str = "gen") -> Question:
        """The item as text, after the examples `shots`; InvalidArgumentError for another mode."""
        if mode not in self.modes:
            raise InvalidArgumentError(
                f"mode must be {' or '.join(self.modes)} for {self.name}, got {mode!r}"
            )
        gold = self.ask(item).gold
        if mode == "ppl":
            assert self.choice is not None
            prompt, options, right = self.choice(item)
            return Question(item=item, prompt=prompt, gold=gold, options=options, right=right)
        return Question(item=item, prompt=self._prompt(item, shots), gold=gold)

    def _prompt(self, item: Item, shots: Sequence[Item]) -> str:
        description = self.describe(item.subset) if self.describe else ""
        written = [example.input + example.output for example in map(self.ask, shots)]
        parts = [*([description] if description else []), *written, self.ask(item).input]
        return "\n\n".join(parts)

    def parse(self, reply: str, question: Question) -> str:
        """What is scored of a reply; of a code task, the program to run."""
        return self.read(reply, question)

    def score(self, parsed: str, question: Question) -> float:
        """1.0 or 0.0; InvalidArgumentError for a code task, whose programs are run instead."""
        if self.match is None:
            raise InvalidArgumentError(
                f"{self.name} has no score for a text: expected its program to be run, got "
                "score(); run what parse() returned in the sandbox"
            )
        return self.match(parsed, question)

    def choose(self, logprobs: Sequence[Sequence[float]], question: Question) -> int:
        """The option chosen, by its place, from the token log probabilities of each.

        `logprobs` cover prompt and option together, less the first token, which has none. NaN
        counts as infinitely unlikely; of equals the first is chosen.
        """
        if len(logprobs) != len(question.options) or not logprobs:
            raise InvalidArgumentError(
                f"expected log probabilities of {len(question.options)} options, "
                f"got {len(logprobs)}; give one list for each option of a ppl question"
            )
        return smallest(self.loss(logprobs))


Read = Callable[[Row], "Mapping[str, Any] | None"]


Keep = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a set lies and what its rows are."""

    repo: str
    """On the hub."""
    download: tuple[str, ...]
    """Files there, on the branch above; `{subset}` stands for each subset."""
    items: tuple[str, ...]
    """Where the questions may lie in a folder, best first: names with `*` and `{subset}`."""
    shots: tuple[str, ...] = ()
    """The same of the examples; without any they are drawn from the questions."""
    read: Read
    """A row as the task's fields; None drops it. Raises DataError."""
    shot: Keep | None = None
    """Which of the rows found under `shots` are examples; None: all."""
    subsets: tuple[str, ...] = ("",)
    """All of them, in the official order."""
    subset_of: str = ""
    """The field that names a row's subset in a file for all of them."""
    name_of: str = ""
    """The field that names a row; without it, its place does."""
    columns: tuple[str, ...] = ()
    """What the cells of a .csv without a header are."""
    beside: tuple[str, ...] = ()
    """Files of text for a whole subset, read into each item's field "cot"."""
    advice: str = ""
    """Where else the data is to be had."""
