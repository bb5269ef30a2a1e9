"""MT-Bench: 80 conversations of two turns, answered by a model and rated by a judge.

    bench = load_bench("fastchat/llm_judge/data/mt_bench")
    result = run(bench, model_of(lm), Path("results"), judge=judge)

Zheng et al., Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena, 2023.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...arguments import at_least_one
from ...errors import DataError
from ...files.jsonl import JsonlFile
from ..data.fields import text
from ..report.statistics import Interval, bootstrap
from ..run import described, named
from .folder import answers_path, judgements_path, opened
from .judge import UNRATED, Judgement, judge_answers
from .judge_client import Endpoint
from .questions import (
    CATEGORIES,
    Bench,
    BenchQuestion,
    load_bench,
    question_id,
    turns_of,
)

if TYPE_CHECKING:
    from ...lm.lm import LM

__all__ = [
    "CATEGORIES",
    "QUESTIONS",
    "TEMPERATURES",
    "AnswerFunction",
    "BenchModel",
    "BenchResult",
    "BenchScores",
    "answer_questions",
    "load_bench",
    "model_of",
    "run",
    "scores",
]

TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""By category; FastChat's."""
QUESTIONS = 80
"""That published figures are means over."""
MAX_TOKENS = 1024
"""Of one answer; FastChat's."""

Progress = Callable[[int, int], object]


class AnswerFunction(Protocol):
    """How a model is asked: the conversation so far to its next answer."""

    def __call__(
        self, messages: Sequence[Mapping[str, str]], temperature: float, max_tokens: int
    ) -> str: ...


@dataclass(frozen=True)
class BenchModel:
    """Who answers."""

    name: str
    answer: AnswerFunction
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What decides its answers, for JSON: answers that were made otherwise are not gone on with."""


def model_of(lm: LM) -> BenchModel:
    """A loaded model, with its adapter; its own sampling but for the temperature."""

    def answer(messages: Sequence[Mapping[str, str]], temperature: float, max_tokens: int) -> str:
        sampling = replace(lm.sampling, temperature=temperature, seed=0)  # FastChat's seed
        return lm.generate(messages, max_tokens=max_tokens, sampling=sampling).text

    fixed = {"temperature", "seed"}
    sampling = {name: value for name, value in vars(lm.sampling).items() if name not in fixed}
    return BenchModel(named(lm), answer, {"sampling": sampling, **described(lm)})


@dataclass(frozen=True)
class BenchScores:
    """Mean ratings, 1 to 10, as FastChat's `show_result` reckons them; None: nothing was rated."""

    mean: float | None
    """Over both turns of every question."""
    interval: Interval | None
    """The mean's, by bootstrap of the questions."""
    turns: tuple[float | None, float | None]
    categories: Mapping[str, float | None]
    questions: int
    """That were judged, rated or not."""
    rated: int
    unrated: int
    """Judgements in which no rating was found."""


@dataclass(frozen=True)
class BenchResult:
    """What a run came to."""

    answers: Path
    """The file, as FastChat's `model_answer/MODEL.jsonl`."""
    judgements: Path | None
    """The file, as FastChat's `model_judgment/JUDGE_single.jsonl`; None: there was no judge."""
    scores: BenchScores | None
    message: str
    """What was done, in a line, and how to go on where that was not all."""


def run(
    bench: Bench,
    model: BenchModel,
    folder: Path,
    *,
    judge: Endpoint | None = None,
    workers: int = 4,
    max_tokens: int = MAX_TOKENS,
    progress: Progress = lambda done, of: None,
) -> BenchResult:
    """Answer all questions and have the answers judged; without a judge, stop after the answers.

    Files go to `folder`, made if need be; a run that was broken off goes on from them, and asks the
    judge anew where it gave no rating. `progress` is told how many answers, then how many
    judgements there are, and of how many. Errors as `opened`, `answer_questions` and
    `judge_answers`.
    """
    at_least_one("max_tokens", max_tokens)
    at_least_one("workers", workers)
    data = {"questions": bench.asked}
    settings = {"max_tokens": max_tokens, "sha256": data, **model.settings}
    with opened(folder, model.name, settings):
        path = answers_path(folder, model.name)
        answers = answer_questions(
            bench, model.answer, path, model=model.name, max_tokens=max_tokens, progress=progress
        )
        if judge is None:
            message = (
                f"{len(answers)} answers are in {path}; they are not rated, as no judge was "
                "given: name an OpenAI-compatible endpoint and run again"
            )
            return BenchResult(path, None, None, message)
        judged = judgements_path(folder, judge.model)
        found = scores(
            judge_answers(
                bench, answers, judge, judged, model=model.name, workers=workers, progress=progress
            )
        )
    return BenchResult(path, judged, found, _said(found, judge.model, judged))


def _said(found: BenchScores, judge: str, path: Path) -> str:
    count = found.rated + found.unrated
    if found.rated == 0:
        return (
            f"none of {count} judgements by {judge} has a rating, so there is no score; {path} has "
            "what it said: run again to ask anew, or name another judge"
        )
    again = "; run again to ask for the others anew" if found.unrated else ""
    return f"{found.rated} of {count} judgements by {judge} have a rating{again}"


def answer_questions(
    bench: Bench,
    answer: AnswerFunction,
    path: Path,
    *,
    model: str,
    max_tokens: int = MAX_TOKENS,
    progress: Progress = lambda done, of: None,
) -> dict[int, tuple[str, str]]:
    """Both answers to every question, by question; each is added to the file `path` as it comes.

    Questions that the file has answers to are not asked again: `run` sees to it that they were made
    in the same way. DataError where it is damaged, or its answers are another model's.
    """
    lines = JsonlFile(path)
    found = {}
    for row in lines.rows:
        if (other := text(row, "model_id")) != model:
            raise DataError(
                f"{row.place}: expected answers of {model}, found one of {other}; give another file"
            )
        found[question_id(row)] = turns_of(row)
    found = {
        question.id: found[question.id] for question in bench.questions if question.id in found
    }
    progress(len(found), len(bench.questions))
    for question in bench.questions:
        if question.id not in found:
            found[question.id] = _converse(question, answer, max_tokens)
            lines.add(_record(question, found[question.id], model))
            progress(len(found), len(bench.questions))
    return found


def _converse(question: BenchQuestion, answer: AnswerFunction, max_tokens: int) -> tuple[str, str]:
    temperature = question.temperature
    if temperature is None:
        temperature = TEMPERATURES[question.category]
    first = [{"role": "user", "content": question.turns[0]}]
    reply = answer(first, temperature, max_tokens).strip()
    second = [
        *first,
        {"role": "assistant", "content": reply},
        {"role": "user", "content": question.turns[1]},
    ]
    return reply, answer(second, temperature, max_tokens).strip()


def _record(question: BenchQuestion, turns: tuple[str, str], model: str) -> dict[str, object]:
    return {
        "question_id": question.id,
        "answer_id": uuid.uuid4().hex,
        "model_id": model,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": time.time(),
    }


def scores(judgements: Sequence[Judgement]) -> BenchScores:
    """Means of the ratings over everything, by turn and by category, without the unrated."""
    rated = [judgement for judgement in judgements if judgement.score != UNRATED]
    by_question: dict[int, list[float]] = {}
    for judgement in rated:
        by_question.setdefault(judgement.question, []).append(judgement.score)
    whole = [sum(found) / len(found) for found in by_question.values()]
    return BenchScores(
        mean=_mean(judgement.score for judgement in rated),
        interval=bootstrap({"": whole}) if whole else None,
        turns=(
            _mean(judgement.score for judgement in rated if judgement.turn == 1),
            _mean(judgement.score for judgement in rated if judgement.turn == 2),
        ),
        categories={
            category: _mean(j.score for j in rated if j.category == category)
            for category in CATEGORIES
        },
        questions=len({judgement.question for judgement in judgements}),
        rated=len(rated),
        unrated=len(judgements) - len(rated),
    )


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None
