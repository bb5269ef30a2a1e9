"""Replacing modules inside a model."""

from __future__ import annotations

import mlx.nn as nn
from mlx.utils import tree_unflatten


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`, such as layers.0.mlp, inside `model`."""
    model.update_modules(tree_unflatten([(path, module)]))
