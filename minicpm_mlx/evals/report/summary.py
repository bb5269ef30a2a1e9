"""Summarises a run: scores with intervals, means, and MiniCPM's published scores beside them.

As in MiniCPM's README, a task's score is the plain mean over its subsets, a mean is that of the
tasks, and of the two ways to score multiple choice the higher counts, marked * where it is ppl.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..record import Key, Record, RunRecord, model_title
from ..tasks import TASKS
from .published import MINICPM_2B, PUBLISHED, Figure, published_model
from .published import TASKS as COLUMNS
from .statistics import Interval, bootstrap, over_subsets, wilson

COMPLETE = {"english": 9, "chinese": 2, "average": 11}
"""Columns of the published table."""
MEANS = {"english": "English mean", "chinese": "Chinese mean", "average": "Mean of all"}
LANGUAGES = {"english": ("en",), "chinese": ("zh",), "average": ("en", "zh")}


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """A task in one mode; scores in percent."""

    mode: str
    score: Interval
    subsets: Mapping[str, Interval]
    """By subject; empty for a set without subjects."""
    done: int
    """Questions scored."""
    of: int
    """Questions asked for."""
    cut: int
    """Replies that reached the longest length."""
    unasked: int
    """Questions longer than the model's context, scored as wrong."""
    fewer_shots: int
    """Questions asked with fewer examples, to fit the context."""
    settings: Mapping[str, Any]
    """As `EvalSettings.of`, with the data's origin, hashes and notes."""


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    name: str
    title: str
    language: str
    parts: Mapping[str, PartReport]
    """By mode."""
    counted: str
    """The mode with the higher score, which is the task's."""
    published: Figure | None
    """The model's published score, if `Report.beside` names it."""

    @property
    def part(self) -> PartReport:
        return self.parts[self.counted]


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A plain mean of tasks, in percent."""

    score: Interval
    sets: int
    published: float | None
    """The mean of the published scores of the same tasks."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The summary of a run's folder."""

    model: Mapping[str, Any]
    program: Mapping[str, str]
    beside: str | None
    """The README's name of the model, whose published scores are beside; None: it is not there."""
    tasks: Sequence[TaskReport]
    means: Mapping[str, Mean]
    """By "english", "chinese", "average", where there is a task for them."""

    @property
    def title(self) -> str:
        """The model, and its adapter."""
        return model_title(self.model)

    @property
    def why_alone(self) -> str | None:
        """Why no published scores are beside; None where they are."""
        if self.beside is not None:
            return None
        return (
            f"no published scores beside: the README's are of models as published, such as "
            f"{MINICPM_2B} (SFT and DPO), and not of {self.title}"
        )

    def to_json(self) -> dict[str, Any]:
        """The content of report.json; scores are in per cent."""
        return asdict(self)


def report_of(run: RunRecord | str | Path) -> Report:
    """The report of a folder's records, finished or not; DataError where it holds no run."""
    run = run if isinstance(run, RunRecord) else RunRecord.read(run)
    beside = published_model(run.settings["model"])
    parts: dict[str, dict[str, PartReport]] = {}
    for name, settings in run.parts.items():
        task, _, mode = name.partition(".")
        if task not in TASKS:
            raise DataError(
                f"{run.folder}: has records of {name!r}, a task that this version lacks"
            )
        if records := run.records(name):
            parts.setdefault(task, {})[mode] = _part_report(mode, settings, records)
    figures = {} if beside is None else PUBLISHED[beside].figures
    tasks = [
        TaskReport(
            name=name,
            title=task.title,
            language=task.language,
            parts=parts[name],
            counted=max(parts[name], key=lambda m: (parts[name][m].score.mean, m == "gen")),
            published=figures.get(name),
        )
        for name, task in TASKS.items()
        if name in parts
    ]
    return Report(
        model=run.settings["model"],
        program=run.settings["program"],
        beside=beside,
        tasks=tasks,
        means=_means(tasks, beside),
    )


def _part_report(
    mode: str, settings: Mapping[str, Any], records: Mapping[Key, Record]
) -> PartReport:
    scores: dict[str, list[float]] = {}
    for (subset, _), record in sorted(records.items()):
        scores.setdefault(subset, []).append(float(record["score"]))
    ordered = {subset: scores[subset] for subset in settings["questions"] if subset in scores}
    if len(ordered) != len(scores):
        raise DataError("the records have other subjects than the settings; remove the folder")
    finishes = [record.get("finish") for record in records.values()]
    shots = settings["shots"]
    return PartReport(
        mode=mode,
        score=_interval(ordered),
        subsets={name: _interval({name: values}) for name, values in ordered.items() if name},
        done=len(records),
        of=sum(settings["questions"].values()),
        cut=finishes.count("length"),
        unasked=finishes.count("no room"),
        fewer_shots=sum(record.get("shots", shots) < shots for record in records.values()),
        settings=settings,
    )


def _interval(subsets: Mapping[str, Sequence[float]]) -> Interval:
    """In percent: Wilson's interval of one subset, the bootstrap's of the mean over several."""
    count = sum(map(len, subsets.values()))
    if len(subsets) > 1:
        interval = bootstrap(subsets)
        if interval.low < interval.high:
            return _percent(interval)
    # One subset, or equal scores within every subset, where the bootstrap's interval has no width.
    return _percent(wilson(over_subsets(subsets) * count, count))


def _percent(interval: Interval) -> Interval:
    return Interval(*(100 * value for value in (interval.mean, interval.low, interval.high)))


def _means(tasks: Sequence[TaskReport], beside: str | None) -> dict[str, Mean]:
    means = {}
    published_tasks = [task for task in tasks if task.name in COLUMNS]
    for name, languages in LANGUAGES.items():
        columns = [task for task in published_tasks if task.language in languages]
        if columns:
            score = _mean([task.part.score for task in columns])
            published = _published_mean(name, columns, beside)
            means[name] = Mean(score=score, sets=len(columns), published=published)
    return means


def _published_mean(name: str, tasks: Sequence[TaskReport], beside: str | None) -> float | None:
    """The README's own mean for a complete set of columns, else the mean of these tasks."""
    if beside is None:
        return None
    row = PUBLISHED[beside]
    if len(tasks) == COMPLETE[name]:
        return {"english": row.english, "chinese": row.chinese, "average": row.average}[name]
    figures = [task.published.value for task in tasks if task.published]
    return sum(figures) / len(figures) if len(figures) == len(tasks) else None


def _mean(scores: Sequence[Interval]) -> Interval:
    """The mean of independent scores, with ends derived from theirs.

    Zou and Donner, Statistics in Medicine 27 (2008).
    """
    count = len(scores)
    mean = sum(score.mean for score in scores) / count
    below = math.sqrt(sum((score.mean - score.low) ** 2 for score in scores)) / count
    above = math.sqrt(sum((score.high - score.mean) ** 2 for score in scores)) / count
    return Interval(mean, mean - below, mean + above)
