"""Runs MT-Bench: 80 conversations of two turns, answered by a model and rated by a judge.

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
from ..report.published import mt_bench_score
from ..report.statistics import Interval, bootstrap
from ..run import describe_model, model_name
from .folder import answers_path, judgements_path, open_bench
from .judge import UNRATED, Judgement, judge_answers
from .judge_client import Endpoint
from .questions import CATEGORIES, Bench, BenchQuestion, parse_turns, question_id

if TYPE_CHECKING:
    from ...lm.lm import LM

TEMPERATURES: Mapping[str, float] = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
"""By category; FastChat's."""
QUESTIONS = 80
"""Number of questions behind published scores."""
MAX_TOKENS = 1024
"""Tokens of the longest answer; FastChat's."""

Progress = Callable[[int, int], object]


class AnswerFunction(Protocol):
    """Generates a model's next answer in a conversation."""

    def __call__(
        self, messages: Sequence[Mapping[str, str]], temperature: float, max_tokens: int
    ) -> str: ...


@dataclass(frozen=True)
class BenchModel:
    """The model that answers."""

    name: str
    answer: AnswerFunction
    settings: Mapping[str, Any] = field(default_factory=dict)
    """All that decides its answers, for JSON; a run resumes only with the same settings."""
    published: float | None = None
    """The README's score of this very model."""


def model_of(lm: LM) -> BenchModel:
    """A loaded model with its adapter and its own sampling, at the given temperature."""

    def answer(messages: Sequence[Mapping[str, str]], temperature: float, max_tokens: int) -> str:
        sampling = replace(lm.sampling, temperature=temperature, seed=0)  # FastChat's seed
        return lm.generate(messages, max_tokens=max_tokens, sampling=sampling).text

    fixed = {"temperature", "seed"}
    sampling = {name: value for name, value in vars(lm.sampling).items() if name not in fixed}
    facts = describe_model(lm)
    published = mt_bench_score(facts)
    del facts["repo"]  # runs of earlier versions record none, and are resumed
    return BenchModel(model_name(lm), answer, {"sampling": sampling, **facts}, published)


@dataclass(frozen=True)
class BenchScores:
    """Mean ratings, 1 to 10, as FastChat's `show_result` computes them; None: nothing was rated."""

    mean: float | None
    """Over both turns of every question."""
    interval: Interval | None
    """Of the mean, by bootstrap over the questions."""
    turns: tuple[float | None, float | None]
    categories: Mapping[str, float | None]
    questions: int
    """Questions judged, rated or not."""
    rated: int
    unrated: int
    """Judgements without a rating."""


@dataclass(frozen=True)
class BenchResult:
    """The result of a run."""

    answers: Path
    """The file, in the format of FastChat's `model_answer/MODEL.jsonl`."""
    judgements: Path | None
    """The file, in the format of FastChat's `model_judgment/JUDGE_single.jsonl`; None: no judge."""
    scores: BenchScores | None
    message: str
    """A line on what was done, and how to continue where something is missing."""


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
    """Answers all questions and has the answers judged; without a judge, stops after the answers.

    Writes to `folder`, created if need be. An interrupted run resumes from its files, and asks the
    judge again where it gave no rating. Calls `progress` with the number of answers, then of
    judgements, and their total. Errors as `open_bench`, `answer_questions` and `judge_answers`.
    """
    at_least_one("max_tokens", max_tokens)
    at_least_one("workers", workers)
    data = {"questions": bench.questions_sha256}
    settings = {"max_tokens": max_tokens, "sha256": data, **model.settings}
    with open_bench(folder, model.name, settings):
        path = answers_path(folder, model.name)
        answers = answer_questions(
            bench, model.answer, path, model=model.name, max_tokens=max_tokens, progress=progress
        )
        if judge is None:
            message = (
                f"{len(answers)} answers are in {path}; they are not rated, as there is no judge: "
                "name an OpenAI-compatible endpoint and run again"
            )
            return BenchResult(path, None, None, message)
        judgements = judgements_path(folder, judge.model)
        means = scores(
            judge_answers(
                bench,
                answers,
                judge,
                judgements,
                model=model.name,
                workers=workers,
                progress=progress,
            )
        )
    return BenchResult(path, judgements, means, _message(means, judge.model, judgements))


def _message(means: BenchScores, judge: str, path: Path) -> str:
    count = means.rated + means.unrated
    if means.rated == 0:
        return (
            f"none of {count} judgements by {judge} has a rating, so there is no score; {path} has "
            "its replies: run again to ask once more, or name another judge"
        )
    again = "; run again to ask for the others once more" if means.unrated else ""
    return f"{means.rated} of {count} judgements by {judge} have a rating{again}"


def answer_questions(
    bench: Bench,
    answer: AnswerFunction,
    path: Path,
    *,
    model: str,
    max_tokens: int = MAX_TOKENS,
    progress: Progress = lambda done, of: None,
) -> dict[int, tuple[str, str]]:
    """Both answers to every question, by question; appends each to the file `path`.

    Questions with answers in the file are not asked again; `run` checks that they had the same
    settings. DataError where the file is damaged, or its answers are another model's.
    """
    file = JsonlFile(path)
    recorded = {}
    for row in file.rows:
        if (other := text(row, "model_id")) != model:
            raise DataError(
                f"{row.place}: expected answers of {model}, found one of {other}; give another file"
            )
        recorded[question_id(row)] = parse_turns(row)
    answers = {q.id: recorded[q.id] for q in bench.questions if q.id in recorded}
    progress(len(answers), len(bench.questions))
    for question in bench.questions:
        if question.id not in answers:
            answers[question.id] = _converse(question, answer, max_tokens)
            file.add(_record(question, answers[question.id], model))
            progress(len(answers), len(bench.questions))
    return answers


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
    """Mean ratings of all judgements, by turn and by category, without the unrated."""
    rated = [judgement for judgement in judgements if judgement.score != UNRATED]
    by_question: dict[int, list[float]] = {}
    for judgement in rated:
        by_question.setdefault(judgement.question, []).append(judgement.score)
    means = [sum(ratings) / len(ratings) for ratings in by_question.values()]
    return BenchScores(
        mean=_mean(judgement.score for judgement in rated),
        interval=bootstrap({"": means}) if means else None,
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
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None
