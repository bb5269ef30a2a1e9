"""Runs tasks on a model and records each question as soon as it is scored.

plan = prepare(EvalSettings(tasks=("arc_easy",), mode="ppl"), "data")
report = run(mm.load("demo"), plan, "results")
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.scoring.loglikelihood import Alternatives, score, shared_prefix_length
from ..errors import InvalidArgumentError
from ..lm.fingerprint import fingerprint
from ..weights.load import parameters
from .data.load import EvalData, load
from .examples import draw_examples
from .generation import GeneratedReply, generate_replies
from .option_scores import encode_options
from .question import Doc, Question
from .record import Record, RunRecord, by_question, open_run
from .report.summary import Report, report_of
from .report.write import write_report
from .sandbox.runner import containment, run_programs
from .settings import EvalSettings, TaskPart
from .task import Task

if TYPE_CHECKING:
    from ..lm.lm import LM


PROGRAMS = 16
"""Replies collected before their programs are run: a program takes seconds, and the device should
not wait for each."""


@dataclass(frozen=True)
class EvalProgress:
    """Progress of a part."""

    part: TaskPart
    done: int
    total: int
    mean: float | None
    """Mean score of the questions done, from 0 to 1; None before the first."""
    seconds_left: float | None
    """Until the part is done, at the speed so far; None before this run has done a question."""


Listener = Callable[[EvalProgress], object]


@dataclass(frozen=True)
class EvalPlan:
    """The questions of a run, with their data."""

    settings: EvalSettings
    data: Mapping[str, EvalData]
    """By task."""
    docs: Mapping[str, tuple[Doc, ...]]
    """The documents to ask by task, in order."""


def prepare(
    settings: EvalSettings, data: str | Path | None = None, *, progress: bool = True
) -> EvalPlan:
    """Reads the data of all parts, from a folder or the hub; errors as `data.load`.

    InvalidArgumentError for a subject that no set has, or where programs cannot be contained;
    DataError where there are too few examples for a question.
    """
    tasks = {part.task.name: part.task for part in settings.parts}
    if any(task.needs_code for task in tasks.values()):
        containment()
    known = {subset for task in tasks.values() for subset in task.source.subsets}
    if unknown := [subject for subject in settings.subjects if subject not in known or not subject]:
        choices = ", ".join(sorted(filter(None, known))) or "a task that has any"
        raise InvalidArgumentError(
            f"must be of {choices}; none of the tasks has {', '.join(unknown)}",
            field="subjects",
        )
    loaded = {name: load(task, data, progress=progress) for name, task in tasks.items()}
    docs = {name: _sample_docs(task, loaded[name], settings) for name, task in tasks.items()}
    for part in settings.parts:
        if part.mode == "gen":
            for doc in docs[part.task.name]:  # raises where there are too few examples
                draw_examples(part.task, doc, loaded[part.task.name], settings.seed, settings.shots)
    return EvalPlan(settings, loaded, docs)


def _sample_docs(task: Task, data: EvalData, settings: EvalSettings) -> tuple[Doc, ...]:
    """At most `settings.limit` documents of each subset that is asked for."""
    sampled: list[Doc] = []
    for subset, docs in data.docs.items():
        if subset and settings.subjects and subset not in settings.subjects:
            continue
        random_order = random.Random(f"{settings.seed}/{task.name}/{subset}")
        order = random_order.sample(range(len(docs)), len(docs))
        sampled.extend(docs[index] for index in sorted(order[: settings.limit]))
    if not sampled:
        raise InvalidArgumentError(
            f"{task.name} has none of {', '.join(settings.subjects)}; leave it out, or name some "
            f"of {', '.join(data.docs)}"
        )
    return tuple(sampled)


def run(
    lm: LM, plan: EvalPlan, folder: str | Path, *, progress: Listener = lambda progress: None
) -> Report:
    """Scores the questions not recorded yet, writes the report to `folder` and returns it.

    Each question is recorded when it is scored; after an interruption the same call resumes.
    InvalidArgumentError where the folder has a run with other settings, another model or other
    data; errors as `open_run`, `generate_replies` and `loglikelihood.score`.
    """
    with open_run(folder) as record:
        record.begin(describe_model(lm), _versions(), _describe_parts(plan))
        for part in plan.settings.parts:
            _run_part(lm, part, plan, record, progress)
        report = report_of(record)
        write_report(report, record.folder)
    return report


def check_folder(folder: str | Path, plan: EvalPlan) -> None:
    """Refuses a folder that `run` would, but for the model's sake: before a model is loaded."""
    path = Path(folder)
    if path.is_dir() and any(path.iterdir()):
        with open_run(path) as record:
            record.check_parts(_versions(), _describe_parts(plan))


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("minicpm-mlx", "mlx", "mlx-lm")}


def model_name(lm: LM) -> str:
    """The model with its adapter, as part of a folder's name."""
    return lm.card.name if lm.adapter is None else f"{lm.card.name}+{lm.adapter.name}"


def describe_model(lm: LM) -> dict[str, Any]:
    """A model for a run's settings: name, repository, adapter, dtypes, fingerprint."""
    dtypes = {str(array.dtype)[9:] for array in parameters(lm.model).values()}
    return {
        "name": lm.card.name,
        "repo": lm.card.repo,
        "adapter": None if lm.adapter is None else "/".join(lm.adapter.parts[-2:]),
        "dtypes": ", ".join(sorted(dtypes)),
        "identity": fingerprint(lm),
    }


def _describe_parts(plan: EvalPlan) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for part in plan.settings.parts:
        data = plan.data[part.task.name]
        parts[part.name] = {
            **plan.settings.of(part),
            "origin": data.origin,
            "sha256": dict(data.sha256),
            "notes": list(data.notes),
            "questions": dict(Counter(doc.subset for doc in plan.docs[part.task.name])),
        }
        if part.task.needs_code:
            parts[part.name]["sandbox"] = containment()
    return parts


def _run_part(
    lm: LM, part: TaskPart, plan: EvalPlan, record: RunRecord, listener: Listener
) -> None:
    docs, data = plan.docs[part.task.name], plan.data[part.task.name]
    file = record.open_part(part.name)
    done = by_question(file.rows)
    remaining = [doc for doc in docs if (doc.subset, doc.id) not in done]
    scores = [float(row["score"]) for row in done.values()]
    meter = _ProgressMeter(part, len(docs), scores, listener)
    if part.mode == "ppl":
        rows = _compare_options(lm, part.task, remaining)
    else:
        replies = generate_replies(lm, part.task, remaining, data, plan.settings)
        rows = (_run_replies if part.task.needs_code else _score_replies)(part.task, replies)
    for row in rows:
        file.add(row)
        meter.add(float(row["score"]))


class _ProgressMeter:
    """Reports the progress of a part to a listener."""

    def __init__(self, part: TaskPart, total: int, scores: list[float], listener: Listener) -> None:
        self.part, self.total, self.listener = part, total, listener
        self.done, self.sum, self.resumed_at = len(scores), sum(scores), len(scores)
        self.start = time.monotonic()
        self._report()

    def add(self, score: float) -> None:
        self.done += 1
        self.sum += score
        self._report()

    def _report(self) -> None:
        new = self.done - self.resumed_at
        pace = (time.monotonic() - self.start) / new if new else None
        seconds_left = None if pace is None else pace * (self.total - self.done)
        mean = self.sum / self.done if self.done else None
        self.listener(EvalProgress(self.part, self.done, self.total, mean, seconds_left))


def _score_replies(task: Task, replies: Iterator[GeneratedReply]) -> Iterator[Record]:
    for reply in replies:
        parsed = task.parse(reply.text, reply.question)
        yield _reply_record(reply, parsed, task.score(parsed, reply.question))


def _run_replies(task: Task, replies: Iterator[GeneratedReply]) -> Iterator[Record]:
    """The records of a code task; runs the programs of some replies at a time."""
    while batch := list(islice(replies, PROGRAMS)):
        programs = [task.parse(reply.text, reply.question) for reply in batch]
        outcomes = run_programs(programs)
        for reply, program, outcome in zip(batch, programs, outcomes, strict=True):
            record = _reply_record(reply, program, float(outcome.passed))
            yield {**record, "outcome": outcome.reason}


def _reply_record(reply: GeneratedReply, parsed: str, score: float) -> dict[str, Any]:
    return {
        "subset": reply.question.doc.subset,
        "id": reply.question.doc.id,
        "prompt": reply.prompt,
        "shots": reply.few_shot,
        **({"thinking": reply.thinking} if reply.thinking else {}),
        "reply": reply.text,
        "tokens": reply.tokens,
        "finish": reply.finish,
        "parsed": parsed,
        "gold": reply.question.gold,
        "score": score if reply.finish != "no room" else 0.0,
    }


def _compare_options(lm: LM, task: Task, docs: Sequence[Doc]) -> Iterator[Record]:
    """The records of ppl questions.

    Log probabilities of the tokens that all options share are not computed: they cancel out.
    """
    questions = [task.question(doc, mode="ppl") for doc in docs]
    asked: list[Question] = []
    too_long: list[Question] = []

    def groups() -> Iterator[Alternatives]:
        for question in questions:
            texts = encode_options(lm.tokenizer, question.prompt, question.options)
            if max(map(len, texts)) > lm.context_length:
                too_long.append(question)
            else:
                asked.append(question)
                yield Alternatives(texts, shared_prefix_length(texts))

    for index, scores in score(lm.model, groups(), context=lm.context_length):
        question = asked[index]
        logprobs = [option.logprobs for option in scores]
        losses = [loss if math.isfinite(loss) else None for loss in task.loss(logprobs)]
        yield _option_record(question, task.choose(logprobs, question), losses)
    for question in too_long:
        yield {**_option_record(question, None, []), "finish": "no room"}


def _option_record(
    question: Question, choice: int | None, losses: list[float | None]
) -> dict[str, Any]:
    return {
        "subset": question.doc.subset,
        "id": question.doc.id,
        "prompt": question.prompt,
        "options": list(question.options),
        "losses": losses,
        "choice": choice,
        "right": question.right,
        "score": float(choice == question.right),
    }
