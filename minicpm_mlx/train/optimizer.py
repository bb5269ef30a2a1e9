"""MLX's optimizers by name, learning rate schedules, and gradient clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.optimizers as optimizers

from ..arguments import Limit, check_limits, limited, one_of

Arrays = dict[str, mx.array]

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")

SCHEDULES = ("cosine", "linear", "constant", "wsd")
"""wsd: warmup, stable, decay, as MiniCPM was trained (arXiv 2404.06395)."""

DECAY_SHARE = 0.1
"""Share of all steps in which wsd decays."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate at each step."""

    kind: str = "cosine"
    """One of SCHEDULES."""
    peak: float = limited(2e-4, above=0, below=math.inf)
    floor: float = limited(0.1, least=0, most=1)
    """The final rate as a share of the peak; `constant` ignores it."""
    warmup: int = limited(0, least=0, whole=True)
    """Steps in which the rate rises to the peak."""

    def __post_init__(self) -> None:
        one_of("schedule", self.kind, SCHEDULES)
        check_limits(self)

    # MLX's schedules compute in float32, and would log a rate of 0.0002 as 0.00019999999494757503.
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
        decay = (1 + math.cos(math.pi * done)) / 2 if self.kind == "cosine" else 1 - done
        return self.peak * (self.floor + (1 - self.floor) * decay)


class Optimizer:
    """An optimizer of MLX for parameters by name; parameters of one dimension do not decay.

    Muon trains the matrices of the layers; AdamW trains all other parameters with it.
    """

    def __init__(self, name: str = "adamw", weight_decay: float = 0.0):
        one_of("optimizer", name, OPTIMIZERS)
        Limit(least=0, below=1).check("weight_decay", weight_decay)
        outer = "adamw" if name == "muon" else name
        self._groups = {
            "inside": _create(name, weight_decay),
            "ends": _create(outer, weight_decay),
            "vectors": _create(outer, 0.0),
        }

    def step(self, rate: float, gradients: Arrays, parameters: Arrays) -> Arrays:
        """Returns the parameters after a step with that learning rate."""
        updated: Arrays = {}
        for group, optimizer in self._groups.items():
            names = [name for name in gradients if _group(name, gradients[name]) == group]
            if names:
                optimizer.learning_rate = rate
                updated |= optimizer.apply_gradients(
                    {name: gradients[name] for name in names},
                    {name: parameters[name] for name in names},
                )
        return updated

    @property
    def state(self) -> Arrays:
        """The state of all groups, as "group/parameter/name" or "group/name"."""
        arrays: Arrays = {}
        for group, optimizer in self._groups.items():
            for name, value in optimizer.state.items():
                if isinstance(value, dict):
                    arrays |= {f"{group}/{name}/{key}": array for key, array in value.items()}
                else:
                    arrays[f"{group}/{name}"] = value
        return arrays

    @state.setter
    def state(self, arrays: Arrays) -> None:
        for group, optimizer in self._groups.items():
            state: dict[str, Any] = {}
            for path, array in arrays.items():
                prefix, name, *key = path.split("/")
                if prefix == group and key:
                    state.setdefault(name, {})[key[0]] = array
                elif prefix == group:
                    state[name] = array
            if state:
                optimizer.state = state
                optimizer._initialized = True  # otherwise it would reset the state


def _create(name: str, weight_decay: float) -> Any:
    options: dict[str, Any] = {"weight_decay": weight_decay}
    match name:
        case "adamw":
            return optimizers.AdamW(0.0, betas=[0.9, 0.95], bias_correction=True, **options)
        case "adafactor":
            options |= {"relative_step": False, "scale_parameter": False}
            return optimizers.Adafactor(0.0, **options)
        case "lion":
            return optimizers.Lion(0.0, **options)
        case "muon":
            return optimizers.Muon(0.0, **options)
        case _:
            return optimizers.SGD(0.0, momentum=0.9, **options)


def _group(name: str, array: mx.array) -> str:
    if array.ndim < 2:
        return "vectors"
    return "inside" if ".layers." in name else "ends"


# mx.optimizers.clip_grad_norm sums the squares of bfloat16 gradients in bfloat16.
def clip(gradients: Arrays, max_norm: float) -> tuple[Arrays, mx.array]:
    """Scales gradients so that their joint norm is at most `max_norm`; returns the norm too."""
    squares = (mx.square(g.astype(mx.float32)).sum() for g in gradients.values())
    norm = mx.sqrt(sum(squares, mx.array(0.0)))
    factor = mx.minimum(max_norm / (norm + 1e-6), 1.0)
    return {name: (g * factor).astype(g.dtype) for name, g in gradients.items()}, norm
