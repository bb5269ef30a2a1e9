"""A stronger model as MT-Bench's judge: single-answer grading, each turn rated 1 to 10.

Prompts, settings and how a rating is read are FastChat's (`llm_judge/common.py`, gen_judgment with
`--mode single`); so is the file of judgements, which FastChat's `show_result` can read.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

from ...arguments import at_least_one
from ...errors import DataError
from ...files.jsonl import JsonlFile
from ...files.rows import Row
from ..data.fields import text, value, wrong
from .judge_client import Endpoint
from .questions import Bench, BenchQuestion

__all__ = ["UNRATED", "Judgement", "judge_answers", "messages", "rating"]

OPTIONS: Mapping[str, Any] = {"n": 1, "temperature": 0, "max_tokens": 2048}
"""FastChat's."""
UNRATED = -1.0
"""The score of a judgement in which no rating from 1 to 10 was found; it enters no mean."""

_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))

Answers = Mapping[int, tuple[str, str]]
"""By question, what the model said in both turns."""


@dataclass(frozen=True)
class Judgement:
    """What the judge said of one turn."""

    question: int
    category: str
    turn: int
    score: float
    """1 to 10, or UNRATED."""
    judgment: str


def rating(judgment: str) -> float:
    """The first `[[rating]]` in what a judge said, else the first `[rating]`.

    UNRATED where there is none, or it is not from 1 to 10, of which FastChat would take any.

    >>> rating("A fine answer. Rating: [[8.5]]")
    8.5
    """
    for pattern in _RATINGS:
        if found := pattern.search(judgment):
            return _in_range(float(found[1]))
    return UNRATED


def _in_range(score: float) -> float:
    return score if 1 <= score <= 10 else UNRATED


def messages(
    bench: Bench, question: BenchQuestion, answers: tuple[str, str], turn: int
) -> list[dict[str, str]]:
    """What a judge is told and asked about a turn, 1 or 2."""
    prompt = bench.prompt(question, turn)
    first, second = question.turns
    parts = {"question": first, "answer": answers[0]}
    if turn == 2:
        parts = {"question_1": first, "question_2": second}
        parts |= {"answer_1": answers[0], "answer_2": answers[1]}
    if question.reference:
        parts |= {"ref_answer_1": question.reference[0], "ref_answer_2": question.reference[1]}
    return [
        {"role": "system", "content": prompt.system},
        {"role": "user", "content": prompt.template.format(**parts)},
    ]


def judge_answers(
    bench: Bench,
    answers: Answers,
    judge: Endpoint,
    path: Path,
    *,
    model: str,
    workers: int = 4,
    options: Mapping[str, Any] = OPTIONS,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> list[Judgement]:
    """Have both turns of every answer rated; the judgements, in the order of the questions.

    Each is appended to the file `path` as it comes, and none is asked for again that the file has
    with a rating, from the same judge of the same words. `model` names who answered; `workers`
    requests are out at once. DataError for an answer that is missing, or a damaged file;
    DownloadError where the judge cannot be had: what is there by then is kept.
    """
    at_least_one("workers", workers)
    if lacking := [q.id for q in bench.questions if q.id not in answers]:
        raise DataError(f"expected an answer to every question, found none to {lacking[0]}")
    lines = JsonlFile(path)
    known = {
        words: record
        for words, record in map(_known, lines.rows)
        if _in_range(record["score"]) != UNRATED
    }
    found: dict[tuple[int, int], Judgement] = {}
    left: list[_Asked] = []
    for question in bench.questions:
        for turn in (1, 2):
            asked = _asked(bench, question, answers[question.id], turn)
            record = known.get((model, judge.model, asked.prompt, asked.messages[1]["content"]))
            if record is None:
                left.append(asked)
            else:
                found[question.id, turn] = _judgement(question, turn, record)
    count = len(found) + len(left)
    progress(len(found), count)
    for asked, said in _at_once(lambda a: (a, judge.chat(a.messages, **options)), left, workers):
        record = _record(asked, said, model, judge.model)
        lines.add(record)  # here, not where it was asked: an answer that comes late is let go
        found[asked.question.id, asked.turn] = _judgement(asked.question, asked.turn, record)
        progress(len(found), count)
    return [found[question.id, turn] for question in bench.questions for turn in (1, 2)]


@dataclass(frozen=True)
class _Asked:
    """One turn that is to be rated."""

    question: BenchQuestion
    turn: int
    prompt: str
    """Its name."""
    messages: list[dict[str, str]]


_Answered = tuple[_Asked, str]


def _asked(bench: Bench, question: BenchQuestion, answers: tuple[str, str], turn: int) -> _Asked:
    name = bench.prompt(question, turn).name
    return _Asked(question, turn, name, messages(bench, question, answers, turn))


def _record(asked: _Asked, said: str, model: str, judge: str) -> dict[str, Any]:
    score = rating(said)
    return {
        "question_id": asked.question.id,
        "model": model,
        "judge": [judge, asked.prompt],
        "user_prompt": asked.messages[1]["content"],
        "judgment": said,
        "score": int(score) if score.is_integer() else score,
        "turn": asked.turn,
        "tstamp": time.time(),
    }


def _at_once(
    work: Callable[[_Asked], _Answered], tasks: Sequence[_Asked], workers: int
) -> Iterator[_Answered]:
    """What `work` makes of each task, as it is done; the first error ends it.

    The threads are daemons, so that Ctrl-C need not wait for a judge that is slow to answer.
    """
    waiting: SimpleQueue[_Asked] = SimpleQueue()
    done: SimpleQueue[_Answered | BaseException] = SimpleQueue()
    ended = Event()
    for task in tasks:
        waiting.put(task)

    def serve() -> None:
        while not ended.is_set():
            try:
                done.put(work(waiting.get_nowait()))
            except Empty:
                return
            except BaseException as error:
                ended.set()  # before the next question is asked, which would be answered in vain
                done.put(error)

    for _ in range(min(workers, len(tasks))):
        Thread(target=serve, daemon=True).start()
    try:
        for _ in tasks:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        ended.set()


def _known(row: Row) -> tuple[tuple[str, str, str, str], dict[str, Any]]:
    """A line of the file by what the judgement was asked with."""
    judge = value(row, "judge")
    if not (isinstance(judge, list) and len(judge) == 2 and all(isinstance(j, str) for j in judge)):
        raise wrong(row, "judge", "the names of a judge and of its prompt", judge)
    score = value(row, "score")
    if not isinstance(score, int | float) or isinstance(score, bool):
        raise wrong(row, "score", "a number", score)
    record = {"score": score, "judgment": text(row, "judgment")}
    return (text(row, "model"), judge[0], judge[1], text(row, "user_prompt")), record


def _judgement(question: BenchQuestion, turn: int, record: Mapping[str, Any]) -> Judgement:
    score, said = float(record["score"]), str(record["judgment"])
    return Judgement(question.id, question.category, turn, score, said)
