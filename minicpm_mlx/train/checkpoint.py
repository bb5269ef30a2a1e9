"""A run's state on the disk: what is needed to go on as if it had never stopped."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import ConfigError, InvalidArgumentError, WeightsError
from ..files.atomic import make_whole
from ..weights import safetensors

Arrays = dict[str, mx.array]

KEPT = 2
"""Checkpoints that are kept, the latest ones."""

ADVICE = "give another folder (--adapter-path)"


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """How far a run has come."""

    step: int = 0
    """Steps done; which samples are next follows from it."""
    tokens: int = 0
    """Read, padding not counted."""
    best: float | None = None
    """Lowest validation loss."""
    best_step: int = 0
    worse: int = 0
    """Validations since the lowest."""
    skipped: int = 0
    """Steps that were left out one after the other, as their gradients were not finite."""
    rolled_back: int = 0
    """Times that a checkpoint was gone back to without a sound step since."""


@dataclass(frozen=True)
class TrainingState:
    """All of a run."""

    parameters: Arrays
    """Those that are trained."""
    optimizer: Arrays
    progress: TrainingProgress
    folder: Path | None = None
    """Where it was read."""


def save(folder: Path, state: TrainingState, fingerprint: Mapping[str, Any]) -> Path:
    """Write a checkpoint of the run in `folder`, and delete old ones; where it is.

    StorageError: it cannot be written; older ones are then as they were.
    """
    place = folder / f"step-{state.progress.step:07d}"
    if place.exists():  # of a run that came as far before it was rolled back
        shutil.rmtree(place)

    def make(partial: Path) -> None:
        mx.save_safetensors(str(partial / "parameters.safetensors"), state.parameters)
        mx.save_safetensors(str(partial / "optimizer.safetensors"), state.optimizer)
        record = {"progress": asdict(state.progress), "run": dict(fingerprint)}
        (partial / "config.json").write_text(json.dumps(record, indent=1), encoding="utf-8")

    make_whole(place, make, ADVICE)
    for older in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(older, ignore_errors=True)
    return place


def checkpoints(folder: Path) -> list[Path]:
    """Those of the run in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def delete_partial(folder: Path) -> None:
    """Delete what processes that were killed left half written in `folder`, which is no other's."""
    for half in folder.glob(".step-*"):
        shutil.rmtree(half, ignore_errors=True)


def load(folder: Path, fingerprint: Mapping[str, Any]) -> TrainingState | None:
    """The latest checkpoint of the run in `folder`; None: there is none.

    InvalidArgumentError: it is of a run that differs in what decides its steps. ConfigError,
    WeightsError: it is damaged.
    """
    found = checkpoints(folder)
    if not found:
        return None
    path = found[-1] / "config.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        progress, run = TrainingProgress(**record["progress"]), dict(record["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path.parent, f"{path.name}: {error}") from None
    _compare(folder.parent, run, fingerprint)
    try:
        parameters, optimizer = (
            {name: tensor.load() for name, tensor in safetensors.read(found[-1] / file).items()}
            for file in ("parameters.safetensors", "optimizer.safetensors")
        )
    except WeightsError as error:
        raise damaged(found[-1], str(error)) from None
    return TrainingState(parameters, optimizer, progress, found[-1])


def damaged(place: Path, what: object) -> ConfigError:
    """The error for a checkpoint that is not what was saved."""
    return ConfigError(
        f"{place}: expected a checkpoint's state ({what}); delete {place.name} to go on from the "
        "one before"
    )


OPTIONS = {
    "steps": "--iters or --epochs",
    "batch_size": "--batch-size",
    "accumulate": "--grad-accumulation-steps",
    "weight_decay": "--weight-decay",
    "schedule peak": "--learning-rate",
    "schedule kind": "--lr-schedule",
    "schedule warmup": "--warmup",
    "method kind": "--fine-tune-type",
    "method rank_stabilized": "--rslora",
    "method layers": "--num-layers",
    "loss loss": "--loss",
}
"""What decides a run's steps, as its user gives it."""


def _compare(folder: Path, run: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """InvalidArgumentError where a run was begun with something else."""
    before, now = _flat(run), _flat(wanted)
    hashes = {"base": "another model", "data": "other training or validation data"}
    for name in sorted(before.keys() | now.keys(), key=lambda name: (name in hashes, name)):
        if before.get(name) == now.get(name):
            continue
        option = OPTIONS.get(name, f"--{name.rpartition(' ')[2].replace('_', '-')}")
        values = f"another {option}: it was {before.get(name)}, and is {now.get(name)}"
        raise InvalidArgumentError(
            f"--resume: the run in {folder} was begun with {hashes.get(name, values)}; give what "
            "it was begun with, or another --adapter-path"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= (
            _flat(value, f"{prefix}{name} ") if isinstance(value, dict) else {prefix + name: value}
        )
    return found
