"""Optimizers of MLX by name, schedules of the learning rate, and clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers

from ..arguments import number, whole
from ..errors import InvalidArgumentError

Arrays = dict[str, mx.array]

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")

SCHEDULES = ("cosine", "linear", "constant", "wsd")
"""wsd: warm-up, stable, decay, as MiniCPM was trained (arXiv 2404.06395)."""

DECAY_SHARE = 0.1
"""Of all steps in which wsd decays."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate at each step."""

    kind: str = "cosine"
    """One of SCHEDULES."""
    peak: float = 2e-4
    floor: float = 0.1
    """Where it ends, as a share of the peak; in `constant` nowhere."""
    warmup: int = 0
    """Steps in which it rises to the peak."""

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise InvalidArgumentError(
                f"lr-schedule must be one of {', '.join(SCHEDULES)}, got {self.kind!r}"
            )
        if not 0 < number("learning-rate", self.peak) < math.inf:
            raise InvalidArgumentError(f"learning-rate must be more than 0, got {self.peak:g}")
        if not 0 <= number("lr-floor", self.floor) <= 1:
            raise InvalidArgumentError(f"lr-floor must be in [0, 1], got {self.floor:g}")
        if whole("warmup", self.warmup) < 0:
            raise InvalidArgumentError(f"warmup must be 0 or more, got {self.warmup}")

    def at(self, step: int, steps: int) -> float:
        """The rate of step `step`, counted from 0, of `steps`."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.kind == "constant":
            return self.peak
        begin = self.warmup
        if self.kind == "wsd":
            begin = max(begin, steps - max(1, round(steps * DECAY_SHARE)))
        done = min(1.0, max(0.0, (step - begin) / max(1, steps - begin)))
        left = (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
        return self.peak * (self.floor + (1 - self.floor) * left)


class Optimizer:
    """One of MLX's optimizers for parameters by name; those of one dimension do not decay.

    Muon is for matrices inside the layers, and goes with AdamW for all others.
    """

    def __init__(self, name: str = "adamw", weight_decay: float = 0.0):
        if name not in OPTIMIZERS:
            raise InvalidArgumentError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}"
            )
        if not 0 <= number("weight-decay", weight_decay) < 1:
            raise InvalidArgumentError(f"weight-decay must be in [0, 1), got {weight_decay:g}")
        outside = "adamw" if name == "muon" else name
        self._groups = {
            "inside": _made(name, weight_decay),
            "ends": _made(outside, weight_decay),
            "vectors": _made(outside, 0.0),
        }

    def step(self, rate: float, gradients: Arrays, parameters: Arrays) -> Arrays:
        """The parameters after a step of that learning rate."""
        changed: Arrays = {}
        for group, optimizer in self._groups.items():
            names = [name for name in gradients if _group(name, gradients[name]) == group]
            if names:
                optimizer.learning_rate = rate
                changed |= optimizer.apply_gradients(
                    {name: gradients[name] for name in names},
                    {name: parameters[name] for name in names},
                )
        return changed

    @property
    def state(self) -> Arrays:
        """All that it remembers, by name."""
        return {
            f"{group}/{name}": array
            for group, optimizer in self._groups.items()
            for name, array in _flat(optimizer.state).items()
        }

    @state.setter
    def state(self, arrays: Arrays) -> None:
        for group, optimizer in self._groups.items():
            state: dict[str, Any] = {}
            for name, array in arrays.items():
                place, *path, last = name.split("/")
                if place == group:
                    inner = state
                    for part in path:
                        inner = inner.setdefault(part, {})
                    inner[last] = array
            if state:
                optimizer.state = state
                optimizer._initialized = True  # or it would begin anew


def _made(name: str, decay: float) -> Any:
    match name:
        case "adamw":
            how: dict[str, Any] = {"betas": [0.9, 0.95], "bias_correction": True}
            return optimizers.AdamW(0.0, weight_decay=decay, **how)
        case "adafactor":
            how = {"relative_step": False, "scale_parameter": False}
            return optimizers.Adafactor(0.0, weight_decay=decay, **how)
        case "lion":
            return optimizers.Lion(0.0, weight_decay=decay)
        case "muon":
            return optimizers.Muon(0.0, weight_decay=decay)
        case _:
            return optimizers.SGD(0.0, momentum=0.9, weight_decay=decay)


def _group(name: str, array: mx.array) -> str:
    if array.ndim < 2:
        return "vectors"
    return "inside" if ".layers." in name else "ends"


def _flat(state: dict[str, Any], prefix: str = "") -> Arrays:
    found: Arrays = {}
    for name, value in state.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}/")
        else:
            found[prefix + name] = value
    return found


def clip(gradients: Arrays, most: float) -> tuple[Arrays, mx.array]:
    """Gradients made so small that their norm together is at most `most`, and what it was."""
    total = mx.sqrt(
        sum((mx.square(g.astype(mx.float32)).sum() for g in gradients.values()), mx.array(0.0))
    )
    factor = mx.minimum(most / (total + 1e-6), 1.0)
    return {name: (g * factor).astype(g.dtype) for name, g in gradients.items()}, total
