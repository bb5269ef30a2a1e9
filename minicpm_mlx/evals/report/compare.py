"""Compares two runs question by question: which is better, how sure that is, what changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError
from ..record import Key, Record, RunRecord
from .statistics import Comparison, compare, over_subsets


@dataclass(frozen=True, kw_only=True)
class PartComparison:
    """A part that both runs have."""

    questions: int
    """Questions that both runs have scored."""
    first: float
    """The first run's score of these questions in percent, averaged over subsets as in a report."""
    second: float
    comparison: Comparison
    """Of the scores from 0 to 1."""
    gained: tuple[Key, ...]
    """Subset and id of questions whose score rose from the first run to the second."""
    lost: tuple[Key, ...]


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    models: tuple[str, str]
    """Each run's model and folder."""
    parts: Mapping[str, PartComparison]
    """By name, such as "mmlu.gen"."""
    notes: tuple[str, ...]
    """Questions not compared, and settings that differ."""

    def to_json(self) -> dict[str, Any]:
        """All scores and their differences are in per cent, as in a report."""
        record = asdict(self)
        for part in record["parts"].values():
            for name in ("difference", "low", "high"):
                part["comparison"][name] *= 100
        return record


def compare_runs(first: str | Path, second: str | Path) -> RunComparison:
    """Compares the parts that two folders of runs share.

    DataError where a folder holds no run, the runs share no question, or a question differs.
    """
    runs = RunRecord.read(first), RunRecord.read(second)
    parts: dict[str, PartComparison] = {}
    notes: list[str] = []
    if runs[0].settings["model"]["identity"] == runs[1].settings["model"]["identity"]:
        notes.append("both are runs of the same model")
    if alone := sorted(runs[0].parts.keys() ^ runs[1].parts.keys()):
        notes.append(f"in only one of the runs: {', '.join(alone)}")
    for name in (name for name in runs[0].parts if name in runs[1].parts):
        notes += _differences(name, runs[0].parts[name], runs[1].parts[name])
        records = runs[0].records(name), runs[1].records(name)
        common = sorted(records[0].keys() & records[1].keys())
        if count := len(records[0].keys() ^ records[1].keys()):
            notes.append(f"{name}: questions scored in only one of the runs: {count}")
        if common:
            parts[name] = _compare_part(name, records[0], records[1], common)
    if not parts:
        raise DataError(
            f"{first} and {second}: expected runs with questions in common, found none; run "
            "the same tasks with the same seed and limit"
        )
    models = f"{runs[0].model} ({first})", f"{runs[1].model} ({second})"
    return RunComparison(models=models, parts=parts, notes=tuple(notes))


def _differences(name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Settings that differ, so that more than the model may change the scores."""
    ignored = ("limit", "notes", "origin", "questions", "sandbox", "sha256", "subjects")
    differing = [
        f"{key} {first.get(key)} and {second.get(key)}"
        for key in sorted({*first, *second} - set(ignored))
        if first.get(key) != second.get(key)
    ]
    return [f"{name} ran with other settings: {', '.join(differing)}"] if differing else []


def _compare_part(
    name: str, first: Mapping[Key, Record], second: Mapping[Key, Record], common: list[Key]
) -> PartComparison:
    for key in common:
        for field in ("gold", "options", "right"):
            if first[key].get(field) != second[key].get(field):
                raise DataError(
                    f"{name}: question {' '.join(filter(None, key))} differs between the runs; "
                    "compare runs of the same data"
                )
    before = [float(first[key]["score"]) for key in common]
    after = [float(second[key]["score"]) for key in common]
    pairs = list(zip(common, before, after, strict=True))
    subsets = [subset for subset, _ in common]
    return PartComparison(
        questions=len(common),
        first=100 * over_subsets(_by_subset(first, common)),
        second=100 * over_subsets(_by_subset(second, common)),
        comparison=compare(before, after, subsets),
        gained=tuple(key for key, a, b in pairs if b > a),
        lost=tuple(key for key, a, b in pairs if b < a),
    )


def _by_subset(records: Mapping[Key, Record], keys: Sequence[Key]) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {}
    for key in keys:
        scores.setdefault(key[0], []).append(float(records[key]["score"]))
    return scores
