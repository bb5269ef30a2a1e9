"""Has answers rated by a judge: MT-Bench's single-answer grading, each turn rated from 1 to 10.

Prompts, settings and the parsing of a rating are FastChat's (`llm_judge/common.py`, gen_judgment
with `--mode single`). So is the file of judgements, which FastChat's `show_result` reads.
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

OPTIONS: Mapping[str, Any] = {"n": 1, "temperature": 0, "max_tokens": 2048}
"""FastChat's."""
UNRATED = -1.0
"""The score of a judgement without a rating from 1 to 10; means leave it out."""

_RATINGS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))

Answers = Mapping[int, tuple[str, str]]
"""The model's answers in both turns, by question."""


@dataclass(frozen=True)
class Judgement:
    """The judge's verdict on one turn."""

    question: int
    category: str
    turn: int
    score: float
    """1 to 10, or UNRATED."""
    judgment: str


def parse_rating(judgment: str) -> float:
    """The first `[[rating]]` in a judgement, else the first `[rating]`.

    UNRATED where there is none, or it is not from 1 to 10; FastChat accepts any number.

    >>> parse_rating("A fine answer. Rating: [[8.5]]")
    8.5
    """
    for pattern in _RATINGS:
        if match := pattern.search(judgment):
            return float(match[1]) if 1 <= float(match[1]) <= 10 else UNRATED
    return UNRATED


def judge_messages(
    bench: Bench, question: BenchQuestion, answers: tuple[str, str], turn: int
) -> list[dict[str, str]]:
    """The judge's messages for a turn, 1 or 2."""
    prompt = bench.prompt(question, turn)
    first, second = question.turns
    fields = {"question": first, "answer": answers[0]}
    if turn == 2:
        fields = {"question_1": first, "question_2": second}
        fields |= {"answer_1": answers[0], "answer_2": answers[1]}
    if question.reference:
        fields |= {"ref_answer_1": question.reference[0], "ref_answer_2": question.reference[1]}
    return [
        {"role": "system", "content": prompt.system},
        {"role": "user", "content": prompt.template.format(**fields)},
    ]


@dataclass(frozen=True)
class _JudgeRequest:
    """One turn to rate."""

    question: BenchQuestion
    turn: int
    prompt: str
    """The prompt's name."""
    messages: list[dict[str, str]]

    @property
    def user_prompt(self) -> str:
        return self.messages[1]["content"]

    def judgement(self, record: Mapping[str, Any]) -> Judgement:
        score, judgment = float(record["score"]), str(record["judgment"])
        return Judgement(self.question.id, self.question.category, self.turn, score, judgment)


_Reply = tuple[_JudgeRequest, str]


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
    """Has both turns of every answer rated; returns judgements in the order of the questions.

    Appends each judgement to the file `path` as it comes. A judgement with a rating that the file
    already has from the same judge for the same prompt is not requested again. `model` names the
    model that answered; `workers` requests run at once. DataError for a missing answer or a
    damaged file; DownloadError where the judge cannot be reached: earlier judgements are kept.
    """
    at_least_one("workers", workers)
    if missing := [q.id for q in bench.questions if q.id not in answers]:
        raise DataError(f"expected an answer to every question, found none to {missing[0]}")
    file = JsonlFile(path)
    records = map(_parse_record, file.rows)
    known = {key: record for key, record in records if 1 <= record["score"] <= 10}
    judgements: dict[tuple[int, int], Judgement] = {}
    remaining: list[_JudgeRequest] = []
    for question in bench.questions:
        for turn in (1, 2):
            request = _JudgeRequest(
                question,
                turn,
                bench.prompt(question, turn).name,
                judge_messages(bench, question, answers[question.id], turn),
            )
            record = known.get((model, judge.model, request.prompt, request.user_prompt))
            if record is None:
                remaining.append(request)
            else:
                judgements[question.id, turn] = request.judgement(record)
    total = len(judgements) + len(remaining)
    progress(len(judgements), total)
    requests = _in_threads(lambda r: (r, judge.chat(r.messages, **options)), remaining, workers)
    for request, judgment in requests:
        record = _record(request, judgment, model, judge.model)
        # Written by this thread: a reply that comes after an error is not recorded.
        file.add(record)
        judgements[request.question.id, request.turn] = request.judgement(record)
        progress(len(judgements), total)
    return [judgements[question.id, turn] for question in bench.questions for turn in (1, 2)]


def _record(request: _JudgeRequest, judgment: str, model: str, judge: str) -> dict[str, Any]:
    score = parse_rating(judgment)
    return {
        "question_id": request.question.id,
        "model": model,
        "judge": [judge, request.prompt],
        "user_prompt": request.user_prompt,
        "judgment": judgment,
        "score": int(score) if score.is_integer() else score,
        "turn": request.turn,
        "tstamp": time.time(),
    }


def _in_threads(
    work: Callable[[_JudgeRequest], _Reply], requests: Sequence[_JudgeRequest], workers: int
) -> Iterator[_Reply]:
    """Results of `work` as they are done; the first error ends it.

    The threads are daemons, so that Ctrl-C need not wait for a slow judge.
    """
    queue: SimpleQueue[_JudgeRequest] = SimpleQueue()
    done: SimpleQueue[_Reply | BaseException] = SimpleQueue()
    ended = Event()
    for request in requests:
        queue.put(request)

    def work_on_queue() -> None:
        while not ended.is_set():
            try:
                done.put(work(queue.get_nowait()))
            except Empty:
                return
            except BaseException as error:
                ended.set()  # before another thread sends a request whose reply would be lost
                done.put(error)

    for _ in range(min(workers, len(requests))):
        Thread(target=work_on_queue, daemon=True).start()
    try:
        for _ in requests:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        ended.set()


def _parse_record(row: Row) -> tuple[tuple[str, str, str, str], dict[str, Any]]:
    """A recorded judgement, with the model, judge, prompt name and prompt as its key."""
    judge = value(row, "judge")
    if not (isinstance(judge, list) and len(judge) == 2 and all(isinstance(j, str) for j in judge)):
        raise wrong(row, "judge", "the names of a judge and of its prompt", judge)
    score = value(row, "score")
    if not isinstance(score, int | float) or isinstance(score, bool):
        raise wrong(row, "score", "a number", score)
    record = {"score": score, "judgment": text(row, "judgment")}
    return (text(row, "model"), judge[0], judge[1], text(row, "user_prompt")), record
