"""Reads MT-Bench's files: questions, reference answers and the judge's prompts.

The user's folder has lm-sys/FastChat's layout of `llm_judge/data`: question.jsonl,
reference_answer/gpt-4.jsonl and, beside or above them, judge_prompts.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError
from ...files.atomic import sha256
from ...files.rows import Row, read_rows
from ..data.fields import text, texts, value, wrong
from ..data.layouts import raise_error

CATEGORIES = (
    "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
)  # fmt: skip
WITH_REFERENCE = frozenset(("reasoning", "math", "coding"))
"""Categories whose judge sees GPT-4's answers too."""

QUESTIONS = ("question.jsonl", "mt_bench_questions.jsonl")
REFERENCES = ("reference_answer/gpt-4.jsonl", "mt_bench_reference_gpt4.jsonl")
PROMPTS = ("judge_prompts.jsonl", "../judge_prompts.jsonl", "mt_bench_judge_prompts.jsonl")

SINGLE = ("single-v1", "single-v1-multi-turn")
SINGLE_WITH_REFERENCE = ("single-math-v1", "single-math-v1-multi-turn")
"""Names of the judge's prompts for the first and the second turn."""

FIELDS = (
    "question", "answer", "question_1", "question_2", "answer_1", "answer_2", "ref_answer_1",
    "ref_answer_2", "answer_a", "answer_b", "answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2",
)  # fmt: skip
"""Fields of the templates; the last six are for comparing two models, which we do not do."""

ADVICE = "give the folder fastchat/llm_judge/data/mt_bench of lm-sys/FastChat"


@dataclass(frozen=True)
class BenchQuestion:
    """Two user turns; the second follows the answer to the first."""

    id: int
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None
    """GPT-4's answers, in the categories with references."""
    temperature: float | None = None
    """The file's `required_temperature`."""


@dataclass(frozen=True)
class JudgePrompt:
    """A prompt of the judge; `template` has fields for question, answer and so on."""

    name: str
    system: str
    template: str


@dataclass(frozen=True)
class Bench:
    """The questions in their order, and the judge's prompts by name."""

    questions: tuple[BenchQuestion, ...]
    prompts: Mapping[str, JudgePrompt]
    sha256: Mapping[str, str]
    """Of each file read, by its name."""

    @property
    def questions_sha256(self) -> str:
        return next(digest for name, digest in self.sha256.items() if name in QUESTIONS)

    def prompt(self, question: BenchQuestion, turn: int) -> JudgePrompt:
        """The official prompt for a question's turn, 1 or 2."""
        return self.prompts[_prompt_name(question.category, turn)]


def load_bench(folder: str | Path) -> Bench:
    """Reads MT-Bench from a folder in FastChat's layout; downloads nothing.

    DataError with file and line for missing or malformed data.
    """
    reader = _QuestionReader(Path(folder))
    references = {question_id(row): parse_turns(row) for row in reader.rows(REFERENCES)}
    questions = [_parse_question(row, references) for row in reader.rows(QUESTIONS)]
    prompts = {prompt.name: prompt for prompt in map(_parse_prompt, reader.rows(PROMPTS))}
    for question in questions:
        for turn in (1, 2):
            if (name := _prompt_name(question.category, turn)) not in prompts:
                raise DataError(
                    f"{reader.find(PROMPTS)}: expected a prompt {name!r}, found none; {ADVICE}"
                )
    return Bench(tuple(questions), prompts, reader.sha256)


class _QuestionReader:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sha256: dict[str, str] = {}

    def rows(self, names: Sequence[str]) -> list[Row]:
        path = self.find(names)
        rows = [raise_error(row) for row in read_rows(path)]
        self.sha256[path.name] = sha256(path)
        return rows

    def find(self, names: Sequence[str]) -> Path:
        for name in names:
            if (path := self.folder / name).is_file():
                return path
        raise DataError(f"{self.folder}: expected {' or '.join(names)} in it, found none; {ADVICE}")


def _prompt_name(category: str, turn: int) -> str:
    return (SINGLE_WITH_REFERENCE if category in WITH_REFERENCE else SINGLE)[turn - 1]


def question_id(row: Row) -> int:
    """The id of the question that a row holds or answers."""
    number = value(row, "question_id")
    if not isinstance(number, int) or isinstance(number, bool):
        raise wrong(row, "question_id", "a whole number", number)
    return number


def _parse_question(row: Row, references: Mapping[int, tuple[str, str]]) -> BenchQuestion:
    category = text(row, "category")
    if category not in CATEGORIES:
        raise wrong(row, "category", f"one of {', '.join(CATEGORIES)}", category)
    number = question_id(row)
    has_reference = category in WITH_REFERENCE
    if has_reference and number not in references:
        raise DataError(
            f"{row.place}: expected a reference answer for question {number}, found none; {ADVICE}"
        )
    temperature = row.value.get("required_temperature")
    if temperature is not None and not isinstance(temperature, int | float):
        raise wrong(row, "required_temperature", "a number", temperature)
    reference = references[number] if has_reference else None
    return BenchQuestion(number, category, parse_turns(row), reference, temperature)


def parse_turns(row: Row) -> tuple[str, str]:
    """The two turns of a question, or of an answer's first choice."""
    if "choices" not in row.value:
        turns = texts(row, "turns")
    else:
        choices = value(row, "choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(first, dict):
            raise wrong(row, "choices", "a list of objects with turns", choices)
        turns = texts(Row(row.place, first), "turns")
    if len(turns) != 2:
        raise DataError(f"{row.place}: expected two turns, found {len(turns)}; correct it")
    return turns[0], turns[1]


def _parse_prompt(row: Row) -> JudgePrompt:
    name, template = text(row, "name"), text(row, "prompt_template")
    try:
        template.format(**dict.fromkeys(FIELDS, ""))
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise DataError(
            f"{row.place}: expected a template with fields for {', '.join(FIELDS[:6])}, found one "
            f"that cannot be filled in ({error}); {ADVICE}"
        ) from None
    return JudgePrompt(name, text(row, "system_prompt"), template)
