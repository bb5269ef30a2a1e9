"""A run: every question of the parts that are asked for, recorded as it is done.

prepared = prepare(Settings(tasks=("arc_easy",), mode="ppl"), "data")
report = run(mm.load("demo"), prepared, "results")
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.scoring.loglikelihood import Alternatives, score, shared
from ..errors import InvalidArgumentError
from ..lm.fingerprint import identity
from ..weights.load import parameters
from .data.load import Loaded, load
from .examples import shots_for
from .generation import GeneratedReply, replies_to
from .option_scores import encoded
from .question import Item, Question
from .record import Record, RunRecord, keyed, opened
from .report.summary import Report, report_of
from .report.write import write_report
from .sandbox.runner import containment, run_programs
from .settings import EvalSettings, TaskPart
from .task import Task

if TYPE_CHECKING:
    from ..lm.lm import LM

__all__ = ["EvalProgress", "Prepared", "prepare", "run"]

PROGRAMS = 16
"""Replies that are collected before their programs are run: those take seconds, and the device
should not wait for each."""


@dataclass(frozen=True)
class EvalProgress:
    """How far a part is."""

    part: TaskPart
    done: int
    of: int
    mean: float | None
    """Mean score of those done, from 0 to 1; None where none is."""
    left: float | None
    """Seconds until the part is done, at the speed so far; None where none was done by this run."""


Listener = Callable[[EvalProgress], object]


@dataclass(frozen=True)
class Prepared:
    """What a run is to do, with its data."""

    settings: EvalSettings
    loaded: Mapping[str, Loaded]
    """By task."""
    items: Mapping[str, tuple[Item, ...]]
    """The questions by task, in their order."""


def prepare(
    settings: EvalSettings, data: str | Path | None = None, *, progress: bool = True
) -> Prepared:
    """Read the data of all parts, from a folder or the hub; errors as `data.load`.

    InvalidArgumentError for a subject that no set has, or where programs cannot be contained;
    DataError where there are too few examples to go before a question.
    """
    tasks = {part.task.name: part.task for part in settings.parts}
    if any(task.needs_code for task in tasks.values()):
        containment()
    known = {subset for task in tasks.values() for subset in task.source.subsets}
    if unknown := [subject for subject in settings.subjects if subject not in known or not subject]:
        raise InvalidArgumentError(
            f"subjects: none of the tasks has {', '.join(unknown)}; they have "
            f"{', '.join(sorted(filter(None, known))) or 'none at all'}"
        )
    loaded = {name: load(task, data, progress=progress) for name, task in tasks.items()}
    items = {name: _chosen(task, loaded[name], settings) for name, task in tasks.items()}
    for part in settings.parts:
        if part.mode == "gen":
            for item in items[part.task.name]:  # that there are enough examples
                shots_for(part.task, item, loaded[part.task.name], settings.seed, settings.shots)
    return Prepared(settings, loaded, items)


def _chosen(task: Task, loaded: Loaded, settings: EvalSettings) -> tuple[Item, ...]:
    found: list[Item] = []
    for subset, items in loaded.items.items():
        if subset and settings.subjects and subset not in settings.subjects:
            continue
        order = random.Random(f"{settings.seed}/{task.name}/{subset}").sample(
            range(len(items)), len(items)
        )
        taken = sorted(order[: settings.limit])
        found.extend(items[place] for place in taken)
    if not found:
        raise InvalidArgumentError(
            f"{task.name} has none of {', '.join(settings.subjects)}; leave it out, or name some "
            f"of {', '.join(loaded.items)}"
        )
    return tuple(found)


def run(
    lm: LM,
    prepared: Prepared,
    folder: str | Path,
    *,
    progress: Listener = lambda progress: None,
) -> Report:
    """Do what is not done yet, write the report to `folder`, and return it.

    Each question is recorded when it is scored; broken off at any point, the same call goes on.
    InvalidArgumentError where the folder has a run with other settings, another model or other
    data; errors as `record.opened`, `generation.replies_to` and `loglikelihood.score`.
    """
    with opened(folder) as record:
        record.begin(described(lm), _program(), _parts(prepared))
        for part in prepared.settings.parts:
            _do(lm, part, prepared, record, progress)
        report = report_of(record)
        write_report(report, record.folder)
    return report


def named(lm: LM) -> str:
    """The model with its adapter, as a part of a folder's name."""
    return lm.card.name if lm.adapter is None else f"{lm.card.name}+{lm.adapter.name}"


def described(lm: LM) -> dict[str, Any]:
    """A model as a run's settings have it: name, adapter, types of its weights, identity."""
    return {
        "name": lm.card.name,
        "adapter": None if lm.adapter is None else "/".join(lm.adapter.parts[-2:]),
        "dtypes": ", ".join(sorted({str(one.dtype)[9:] for one in parameters(lm.model).values()})),
        "identity": identity(lm),
    }


def _program() -> dict[str, str]:
    return {name: version(name) for name in ("minicpm-mlx", "mlx", "mlx-lm")}


def _parts(prepared: Prepared) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in prepared.settings.parts:
        loaded = prepared.loaded[part.task.name]
        counts: dict[str, int] = {}
        for item in prepared.items[part.task.name]:
            counts[item.subset] = counts.get(item.subset, 0) + 1
        found[part.name] = {
            **prepared.settings.of(part),
            "origin": loaded.origin,
            "sha256": dict(loaded.sha256),
            "notes": list(loaded.notes),
            "questions": counts,
        }
        if part.task.needs_code:
            found[part.name]["sandbox"] = containment()
    return found


def _do(lm: LM, part: TaskPart, prepared: Prepared, record: RunRecord, progress: Listener) -> None:
    items = prepared.items[part.task.name]
    lines = record.lines(part.name)
    done = keyed(lines.rows)
    left = [item for item in items if (item.subset, item.id) not in done]
    told = _Told(part, len(items), [float(one["score"]) for one in done.values()], progress)
    loaded, settings = prepared.loaded[part.task.name], prepared.settings
    if part.mode == "ppl":
        found = _compared(lm, part.task, left)
    else:
        replies = replies_to(lm, part.task, left, loaded, settings)
        found = (_programs if part.task.needs_code else _read)(part.task, replies)
    for one in found:
        lines.add(one)
        told.add(float(one["score"]))


class _Told:
    """Tells how far a part is."""

    def __init__(self, part: TaskPart, of: int, scores: list[float], listener: Listener) -> None:
        self.part, self.of, self.listener = part, of, listener
        self.done, self.total, self.before = len(scores), sum(scores), len(scores)
        self.start = time.monotonic()
        self.tell()

    def add(self, score: float) -> None:
        self.done += 1
        self.total += score
        self.tell()

    def tell(self) -> None:
        new = self.done - self.before
        pace = (time.monotonic() - self.start) / new if new else None
        left = None if pace is None else pace * (self.of - self.done)
        mean = self.total / self.done if self.done else None
        self.listener(EvalProgress(self.part, self.done, self.of, mean, left))


def _read(task: Task, replies: Iterator[GeneratedReply]) -> Iterator[Record]:
    for reply in replies:
        parsed = task.parse(reply.text, reply.question)
        yield _record(reply, parsed, task.score(parsed, reply.question))


def _programs(task: Task, replies: Iterator[GeneratedReply]) -> Iterator[Record]:
    """The records of a code task, whose programs are run a few at a time."""
    waiting: list[GeneratedReply] = []
    for reply in replies:
        waiting.append(reply)
        if len(waiting) == PROGRAMS:
            yield from _passed(task, waiting)
            waiting = []
    yield from _passed(task, waiting)


def _passed(task: Task, replies: Sequence[GeneratedReply]) -> Iterator[Record]:
    programs = [task.parse(reply.text, reply.question) for reply in replies]
    outcomes = run_programs(programs)
    for reply, program, outcome in zip(replies, programs, outcomes, strict=True):
        found = _record(reply, program, float(outcome.passed))
        yield {**found, "outcome": outcome.reason}


def _record(reply: GeneratedReply, parsed: str, score: float) -> dict[str, Any]:
    return {
        **_begun(reply.question),
        "prompt": reply.prompt,
        "shots": reply.shots,
        "reply": reply.text,
        "tokens": reply.tokens,
        "finish": reply.finish,
        "parsed": parsed,
        "gold": reply.question.gold,
        "score": score if reply.finish != "no room" else 0.0,
    }


def _begun(question: Question) -> dict[str, Any]:
    return {"subset": question.item.subset, "id": question.item.id}


def _compared(lm: LM, task: Task, items: Sequence[Item]) -> Iterator[Record]:
    """The records of options that are compared, without what they share: it cancels out."""
    questions = [task.question(item, mode="ppl") for item in items]
    fitting: list[Question] = []

    def groups() -> Iterator[Alternatives]:
        for question in questions:
            texts = encoded(lm.tokenizer, question.prompt, question.options)
            if max(map(len, texts)) <= lm.context_length:
                fitting.append(question)
                yield Alternatives(texts, shared(texts))

    done: set[int] = set()
    for place, scores in score(lm.model, groups(), context=lm.context_length):
        question = fitting[place]
        done.add(id(question))
        logprobs = [one.logprobs for one in scores]
        losses = [loss if math.isfinite(loss) else None for loss in task.loss(logprobs)]
        yield _chose(question, task.choose(logprobs, question), losses)
    for question in questions:
        if id(question) not in done:
            yield _chose(question, None, [])


def _chose(question: Question, choice: int | None, losses: list[float | None]) -> Record:
    return {
        **_begun(question),
        "prompt": question.prompt,
        "options": list(question.options),
        "losses": losses,
        "choice": choice,
        "right": question.right,
        "score": float(choice == question.right),
        **({} if choice is not None else {"finish": "no room"}),
    }
