"""Saves and loads the full state of a run, so that it can resume exactly."""

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

KEEP = 2
"""The latest checkpoints to keep."""

ADVICE = "give another folder (--adapter-path)"


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """The progress of a run."""

    step: int = 0
    """Steps done; they decide which samples come next."""
    tokens: int = 0
    """Tokens read, without padding."""
    best: float | None = None
    """Lowest validation loss."""
    best_step: int = 0
    worse: int = 0
    """Validations since the lowest."""
    skipped: int = 0
    """Consecutive steps skipped because their gradients were not finite."""
    rolled_back: int = 0
    """Rollbacks to a checkpoint without a successful step since."""

    @property
    def is_validated(self) -> bool:
        """Whether the validation loss was measured after a step."""
        return self.best_step > 0 or self.worse > 0


@dataclass(frozen=True)
class TrainingState:
    """The full state of a run."""

    parameters: Arrays
    """The trained ones."""
    optimizer: Arrays
    progress: TrainingProgress
    folder: Path | None = None
    """The checkpoint it was loaded from."""


def save(folder: Path, state: TrainingState, fingerprint: Mapping[str, Any]) -> Path:
    """Writes a checkpoint in `folder`, deletes old ones, and returns its path.

    StorageError: it cannot be written; older checkpoints stay as they are.
    """
    path = folder / f"step-{state.progress.step:07d}"
    if path.exists():  # from before a rollback
        shutil.rmtree(path)

    def write(partial: Path) -> None:
        mx.save_safetensors(str(partial / "parameters.safetensors"), state.parameters)
        mx.save_safetensors(str(partial / "optimizer.safetensors"), state.optimizer)
        record = {"progress": asdict(state.progress), "run": dict(fingerprint)}
        (partial / "config.json").write_text(json.dumps(record, indent=1), encoding="utf-8")

    make_whole(path, write, ADVICE)
    for older in checkpoints(folder)[:-KEEP]:
        shutil.rmtree(older, ignore_errors=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))


def delete_partial(folder: Path) -> None:
    """Deletes checkpoints in `folder` that a killed process left half written."""
    for partial in folder.glob(".step-*"):
        shutil.rmtree(partial, ignore_errors=True)


def load(folder: Path, fingerprint: Mapping[str, Any]) -> TrainingState | None:
    """Loads the latest checkpoint in `folder`; None if there is none.

    InvalidArgumentError: the run's settings differ from `fingerprint`. ConfigError: the checkpoint
    is damaged.
    """
    paths = checkpoints(folder)
    if not paths:
        return None
    path = paths[-1]
    progress, run = _record(path)
    _check_same_run(folder.parent, run, fingerprint)
    try:
        parameters, optimizer = (
            {name: tensor.load() for name, tensor in safetensors.read(path / file).items()}
            for file in ("parameters.safetensors", "optimizer.safetensors")
        )
    except WeightsError as error:
        raise damaged(path, str(error)) from None
    return TrainingState(parameters, optimizer, progress, path)


def check(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises the errors of `load` that are known of a part of the fingerprint."""
    if paths := checkpoints(folder):
        _, run = _record(paths[-1])
        run = {name: value for name, value in run.items() if name in settings}
        _check_same_run(folder.parent, run, settings)


def _record(path: Path) -> tuple[TrainingProgress, dict[str, Any]]:
    """The progress and the fingerprint of a checkpoint."""
    try:
        record = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return TrainingProgress(**record["progress"]), dict(record["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"config.json: {error}") from None


def damaged(path: Path, problem: object) -> ConfigError:
    """The error for a checkpoint that cannot be used."""
    return ConfigError(
        f"{path}: expected a checkpoint's state ({problem}); delete {path.name} to resume from the "
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
    "evaluate_every": "--steps-per-eval",
    "validation_samples": "--steps-per-eval",
}
"""Command line options by setting, where the name differs."""


SCHEDULE = ("evaluate_every", "validation_samples")
"""Settings of a plan that say when, and on how many samples, a run validates."""


def recorded_schedule(folder: Path, steps: int) -> dict[str, int | None]:
    """The SCHEDULE of the run in `folder`; {} if there is no checkpoint.

    A run of an older version, which recorded none, validated ten times on all samples.
    """
    if not (paths := checkpoints(folder)):
        return {}
    _, run = _record(paths[-1])
    default = {"evaluate_every": -(-steps // 10), "validation_samples": None}
    return {name: run.get(name, default[name]) for name in SCHEDULE}


def _check_same_run(folder: Path, run: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises InvalidArgumentError if a run was started with other settings."""
    before, now = _flatten(run), _flatten(expected)
    hashes = {"base": "another model", "data": "other training or validation data"}
    for name in sorted(before.keys() | now.keys(), key=lambda name: (name in hashes, name)):
        if before.get(name) == now.get(name) or (name in SCHEDULE and name not in before):
            continue
        option = OPTIONS.get(name, f"--{name.rpartition(' ')[2].replace('_', '-')}")
        change = f"another {option}: it was {before.get(name)}, and is {now.get(name)}"
        raise InvalidArgumentError(
            f"--resume: the run in {folder} was started with {hashes.get(name, change)}; give its "
            "original options, or another --adapter-path"
        )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name} ")
        else:
            flat[prefix + name] = value
    return flat
