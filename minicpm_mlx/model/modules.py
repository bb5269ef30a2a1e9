"""Finding and replacing modules in a model, a projection with an adapter, and measured settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Measurements of a model on this device, for the engine to choose by."""

    most_prefill: int | None = None
    """Most tokens of a prompt to read at once; None: as many as memory allows."""
    draft_costs: tuple[float, ...] = ()
    """Seconds that a pass takes longer by with 1, 2, ... draft tokens, as shares of a plain one."""


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, such as layers.0.mlp, inside `model`."""
    model.update_modules(tree_unflatten([(path, module)]))


def at(module: Any, path: str) -> Any:
    """The submodule at `path`."""
    for name in path.split("."):
        module = module[int(name)] if isinstance(module, list) else module[name]
    return module


class AdaptedLinear(nn.Module):
    """A projection with an adapter: layer(x) + (x a) b, in DoRA times `gain` but for the bias."""

    def __init__(self, layer: nn.Module, a: mx.array, b: mx.array):
        super().__init__()
        self.layer, self.a, self.b = layer, a, b

    def __call__(self, x: mx.array) -> mx.array:
        out = self.layer(x) + (x @ self.a) @ self.b
        if "gain" in self:
            out = out * self.gain
        return out + self.bias if "bias" in self else out
