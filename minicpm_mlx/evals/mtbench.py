"""MT-Bench: 80 conversations of two turns, answered by a model and rated by a judge.

    bench = load_bench("fastchat/llm_judge/data/mt_bench")
    result = run(bench, answers_of(lm), Path("results"), model=lm.card.name, judge=judge)

Zheng et al., Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena, 2023.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..atomic import named_errors
from ..errors import DataError
from .endpoint import Endpoint
from .fields import text
from .judge import UNRATED, Judgement, judge_answers
from .lines import Lines
from .mtbench_files import CATEGORIES, Bench, BenchQuestion, load_bench, question_id, turns_of
from .statistics import Interval, bootstrap

if TYPE_CHECKING:
    from ..lm import LM

__all__ = [
    "CATEGORIES",
    "TEMPERATURES",
    "Answer",
    "Result",
    "Scores",
    "answer_questions",
    "answers_of",
    "load_bench",
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
MAX_TOKENS = 1024
"""Of one answer; FastChat's."""

Progress = Callable[[int, int], object]


class Answer(Protocol):
    """How a model is asked: the conversation so far to its next answer."""

    def __call__(
        self, messages: Sequence[Mapping[str, str]], temperature: float, max_tokens: int
    ) -> str: ...


def answers_of(lm: LM) -> Answer:
    """A loaded model as the callable that answers: its own sampling but for the temperature."""

    def answer(messages: Sequence[Mapping[str, str]], temperature: float, max_tokens: int) -> str:
        sampling = replace(lm.sampling, temperature=temperature, seed=0)  # FastChat's seed
        return lm.generate(messages, max_tokens=max_tokens, sampling=sampling).text

    return answer


@dataclass(frozen=True)
class Scores:
    """Mean ratings, 1 to 10, as FastChat's `show_result` reckons them; None: nothing was rated."""

    mean: float | None
    """Over both turns of every question."""
    interval: Interval | None
    """The mean's, by bootstrap of the questions."""
    turns: tuple[float | None, float | None]
    categories: Mapping[str, float | None]
    rated: int
    unrated: int
    """Judgements in which no rating was found."""


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    answers: Path
    """The file, as FastChat's `model_answer/MODEL.jsonl`."""
    judgements: Path | None
    """The file, as FastChat's `model_judgment/JUDGE_single.jsonl`; None: there was no judge."""
    scores: Scores | None
    message: str
    """What was done, in a line, and how to go on where that was not all."""


def run(
    bench: Bench,
    answer: Answer,
    folder: Path,
    *,
    model: str,
    judge: Endpoint | None = None,
    workers: int = 4,
    max_tokens: int = MAX_TOKENS,
    progress: Progress = lambda done, of: None,
) -> Result:
    """Answer all questions and have the answers judged; without a judge, stop after the answers.

    Files go to `folder`, made if need be; a run that was broken off goes on from them. `progress`
    is told how many answers, then how many judgements there are, and of how many. Errors as
    `answer_questions` and `judge_answers`.
    """
    answers_path = _placed(folder / "model_answer" / f"{_plain(model)}.jsonl")
    answers = answer_questions(
        bench, answer, answers_path, model=model, max_tokens=max_tokens, progress=progress
    )
    if judge is None:
        message = (
            f"{len(answers)} answers are in {answers_path}; they are not rated, as no judge was "
            "given: name an OpenAI-compatible endpoint and run again"
        )
        return Result(answers_path, None, None, message)
    path = _placed(folder / "model_judgment" / f"{_plain(judge.model)}_single.jsonl")
    judgements = judge_answers(
        bench, answers, judge, path, model=model, workers=workers, progress=progress
    )
    found = scores(judgements)
    message = f"{found.rated} of {len(judgements)} judgements by {judge.model} have a rating"
    return Result(answers_path, path, found, message)


def answer_questions(
    bench: Bench,
    answer: Answer,
    path: Path,
    *,
    model: str,
    max_tokens: int = MAX_TOKENS,
    progress: Progress = lambda done, of: None,
) -> dict[int, tuple[str, str]]:
    """Both answers to every question, by question; each is added to the file `path` as it comes.

    Questions that the file has answers to are not asked again. DataError where it is damaged, or
    its answers are another model's.
    """
    lines = Lines(path)
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


def _converse(question: BenchQuestion, answer: Answer, max_tokens: int) -> tuple[str, str]:
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


def scores(judgements: Sequence[Judgement]) -> Scores:
    """Means of the ratings over everything, by turn and by category, without the unrated."""
    rated = [judgement for judgement in judgements if judgement.score != UNRATED]
    by_question: dict[int, list[float]] = {}
    for judgement in rated:
        by_question.setdefault(judgement.question, []).append(judgement.score)
    whole = [sum(found) / len(found) for found in by_question.values()]
    return Scores(
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
        rated=len(rated),
        unrated=len(judgements) - len(rated),
    )


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def _placed(path: Path) -> Path:
    """`path`, once its folder is there."""
    with named_errors(path.parent, "give another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _plain(name: str) -> str:
    """A model's name as a file's: no part of it is a folder, or hidden."""
    return re.sub(r"[^\w.+@-]+", "_", name).lstrip(".") or "model"
