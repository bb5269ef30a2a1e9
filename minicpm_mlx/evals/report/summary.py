"""What a run came to: scores with their intervals, means, and MiniCPM's own figures beside them.

As MiniCPM's README has it, a set's score is the plain mean over its subsets, a mean is that of the
sets, and of the two ways to score multiple choice the higher counts, marked * where it is ppl.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..record import (
    Key,
    Record,
    RunRecord,
)
from ..tasks import TASKS
from .published import PUBLISHED, Figure
from .statistics import (
    Interval,
    bootstrap,
    over_subsets,
    wilson,
)

__all__ = ["Mean", "PartReport", "Report", "TaskReport", "report_of"]

STANDARD = "MiniCPM-2B"
"""Whose figures stand beside those of a model that the README does not name."""
COMPLETE = {"english": 9, "chinese": 2, "average": 11}
"""Columns of the published table."""
MEANS = {"english": "English mean", "chinese": "Chinese mean", "average": "Mean of all"}
LANGUAGES = {"english": ("en",), "chinese": ("zh",), "average": ("en", "zh")}


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """A set in one mode; scores in percent."""

    mode: str
    score: Interval
    subsets: Mapping[str, Interval]
    """By subject; empty for a set that has none."""
    done: int
    """Questions that are scored."""
    of: int
    """Questions that were asked for."""
    cut: int
    """Replies that ended for their length."""
    unasked: int
    """Questions that are longer than the model's context, scored as wrong."""
    fewer_shots: int
    """Questions asked with fewer examples than the others, which the context has no room for."""
    settings: Mapping[str, Any]
    """As `Settings.of`, with the data's origin, hashes and notes."""


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """A set."""

    name: str
    title: str
    language: str
    parts: Mapping[str, PartReport]
    """By mode."""
    counted: str
    """The mode whose score is the set's: the higher."""
    published: Figure | None
    """That of the model beside which this one is put."""

    @property
    def part(self) -> PartReport:
        return self.parts[self.counted]

    @property
    def column(self) -> bool:
        """Whether it is a column of the published table, and so in the means."""
        return self.name in PUBLISHED[STANDARD].figures


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A plain mean of sets, in percent."""

    score: Interval
    sets: int
    published: float | None
    """The mean of the published figures of the same sets."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All there is in a run's folder."""

    model: Mapping[str, Any]
    program: Mapping[str, str]
    beside: str
    """The README's model that the published figures are of."""
    tasks: Sequence[TaskReport]
    means: Mapping[str, Mean]
    """Of "english", "chinese", "average" those that there are sets for."""

    def to_json(self) -> dict[str, Any]:
        """As in report.json."""
        return asdict(self)


def report_of(run: RunRecord | str | Path) -> Report:
    """The report of a folder's records, finished or not; DataError where it holds no run."""
    run = run if isinstance(run, RunRecord) else RunRecord.read(run)
    beside = _beside(str(run.settings["model"]["name"]))
    parts: dict[str, dict[str, PartReport]] = {}
    for name, settings in run.parts.items():
        task, _, mode = name.partition(".")
        if task not in TASKS:
            raise DataError(f"{run.folder}: has records of {name!r}, which this version lacks")
        if records := run.records(name):
            parts.setdefault(task, {})[mode] = _part(mode, settings, records)
    figures = PUBLISHED[beside].figures
    tasks = [
        TaskReport(
            name=name,
            title=task.title,
            language=task.language,
            parts=parts[name],
            counted=max(
                parts[name], key=lambda mode: (parts[name][mode].score.mean, mode == "gen")
            ),
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


def _beside(name: str) -> str:
    """The model of the README that is called like this one."""

    def plain(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    return next((known for known in PUBLISHED if plain(known) == plain(name)), STANDARD)


def _part(mode: str, settings: Mapping[str, Any], records: Mapping[Key, Record]) -> PartReport:
    scores: dict[str, list[float]] = {}
    for (subset, _), record in sorted(records.items()):
        scores.setdefault(subset, []).append(float(record["score"]))
    ordered = {subset: scores[subset] for subset in settings["questions"] if subset in scores}
    if len(ordered) != len(scores):
        raise DataError("the records are of other subjects than the settings; remove the folder")
    finishes = [record.get("finish") for record in records.values()]
    shots = settings["shots"]
    return PartReport(
        mode=mode,
        score=_interval(ordered),
        subsets={name: _interval({name: found}) for name, found in ordered.items() if name},
        done=len(records),
        of=sum(settings["questions"].values()),
        cut=finishes.count("length"),
        unasked=finishes.count("no room"),
        fewer_shots=sum(record.get("shots", shots) < shots for record in records.values()),
        settings=settings,
    )


def _interval(subsets: Mapping[str, Sequence[float]]) -> Interval:
    """In percent: Wilson's of one subset, that of the mean over several by bootstrap."""
    everything = [score for scores in subsets.values() for score in scores]
    if len(subsets) > 1:
        found = bootstrap(subsets)
        if found.low < found.high:
            return _percent(found)
    # One subset, or none in which any two questions differ: the bootstrap would be sure of itself.
    return _percent(wilson(over_subsets(subsets) * len(everything), len(everything)))


def _percent(interval: Interval) -> Interval:
    return Interval(*(100 * value for value in (interval.mean, interval.low, interval.high)))


def _means(tasks: Sequence[TaskReport], beside: str) -> dict[str, Mean]:
    means = {}
    for name, languages in LANGUAGES.items():
        among = [task for task in tasks if task.column and task.language in languages]
        if among:
            score = _mean([task.part.score for task in among])
            published = _published(name, among, beside)
            means[name] = Mean(score=score, sets=len(among), published=published)
    return means


def _published(name: str, among: Sequence[TaskReport], beside: str) -> float | None:
    """The README's own mean where all its columns are there, else that of those which are."""
    row = PUBLISHED[beside]
    if len(among) == COMPLETE[name]:
        return {"english": row.english, "chinese": row.chinese, "average": row.average}[name]
    figures = [task.published.value for task in among if task.published]
    return sum(figures) / len(figures) if len(figures) == len(among) else None


def _mean(scores: Sequence[Interval]) -> Interval:
    """The mean of independent scores; its ends from theirs (Zou and Donner, Statistics in Medicine
    27, 2008)."""
    count = len(scores)
    mean = sum(score.mean for score in scores) / count
    below = math.sqrt(sum((score.mean - score.low) ** 2 for score in scores)) / count
    above = math.sqrt(sum((score.high - score.mean) ** 2 for score in scores)) / count
    return Interval(mean, mean - below, mean + above)
