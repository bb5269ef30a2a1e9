"""Trainable low-rank adapters, put on the projections of `model.transformer.Model`.

LoRA (Hu et al., arXiv 2106.09685), rsLoRA (Kalajdzievski, arXiv 2312.03732) and DoRA (Liu et al.,
arXiv 2402.09353). `model/adapters.py` applies a trained adapter for inference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..arguments import check_limits, limited, one_of
from ..errors import InvalidArgumentError
from ..model.adapters import dense, shape_of
from ..model.config import Config
from ..model.modules import replace_module
from ..model.transformer import Model

KINDS = ("lora", "dora", "full")

PACKED = (
    "full training needs unpacked weights, and this model is quantized; train an adapter (lora or "
    "dora), or take the model it was made from"
)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Selects the parameters to train."""

    kind: str = "lora"
    """`lora`, `dora`, or `full`: every parameter, without an adapter."""
    rank: int = limited(8, least=1, whole=True)
    alpha: float | None = limited(None, above=0, below=math.inf)
    """The product of the two matrices is scaled by alpha / rank; twice the rank by default."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    dropout: float = limited(0.0, least=0, below=1)
    """Share of an adapter's inputs that is dropped in training."""
    layers: int | None = limited(None, least=1, whole=True)
    """Number of layers to train, counted from the last; None: all."""
    modules: tuple[str, ...] | None = None
    """Names of projections; None: all of attention and MLP, but none of experts."""

    def __post_init__(self) -> None:
        one_of("kind", self.kind, KINDS)
        check_limits(self)
        for option in fields(self) if self.kind == "full" else ():
            is_common = option.name in ("kind", "layers")
            if not is_common and getattr(self, option.name) != option.default:
                raise InvalidArgumentError(
                    "is for adapters; full trains every matrix", field=option.name
                )

    @property
    def scale(self) -> float:
        """The factor of the product of the two matrices."""
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


class LoRALinear(nn.Module):
    """A projection with an adapter: layer(x) + scale (x a) b.

    DoRA also rescales each output so that its row of the merged matrix has the learned length `m`.
    """

    def __init__(self, layer: nn.Module, method: LoRAConfig):
        super().__init__()
        out, width = shape_of(layer)
        self.layer, self.scale, self.on = layer, method.scale, True
        self.dropout = method.dropout
        self._key = mx.random.key(0)
        self.lora_a = mx.random.uniform(-(width**-0.5), width**-0.5, (width, method.rank))
        self.lora_b = mx.zeros((method.rank, out))
        if method.kind == "dora":
            self._squared_lengths = mx.square(dense(layer)).sum(axis=1)  # (out,)
            self.m = mx.sqrt(self._squared_lengths)

    def __call__(self, x: mx.array) -> mx.array:
        if not self.on:
            return self.layer(x)
        a, b = self.lora_a.astype(x.dtype), self.lora_b.astype(x.dtype)
        inputs = x
        if self.training and self.dropout:
            kept = mx.random.bernoulli(1 - self.dropout, x.shape, key=self._key)
            inputs = x * kept / (1 - self.dropout)
        out = self.layer(x) + self.scale * ((inputs @ a) @ b)
        if "m" not in self:
            return out
        gain = (self.m / mx.stop_gradient(self._row_lengths(x.dtype))).astype(x.dtype)
        bias = self.layer.get("bias")
        return out * gain if bias is None else (out - bias) * gain + bias

    def _row_lengths(self, dtype: mx.Dtype) -> mx.array:
        """Lengths of the rows of W + scale (a b)^T: (out,), computed without that matrix.

        |w + d|^2 = |w|^2 + 2 w d + |d|^2; inputs of the layer are cast to `dtype`.
        """
        bias = self.layer.get("bias")
        projected = self.layer(self.lora_a.T.astype(dtype))  # (W a)^T: (rank, out)
        if bias is not None:
            projected = projected - bias
        b = self.scale * self.lora_b
        products = (projected.astype(mx.float32) * b).sum(axis=0)
        squares = ((self.lora_a.T @ self.lora_a @ b) * b).sum(axis=0)
        return mx.sqrt(mx.maximum(self._squared_lengths + 2 * products + squares, 1e-12))


def prepare_model(model: Model, method: LoRAConfig) -> None:
    """Freezes all parameters but those that `method` trains, and adds adapters in float32.

    InvalidArgumentError: the model lacks the layers or modules.
    """
    check(method, model.config)
    blocks = model.layers
    if method.kind == "full":
        if any("scales" in module for _, module in model.named_modules()):
            raise InvalidArgumentError(PACKED)
        if method.layers is not None:
            model.freeze()
            for block in blocks[-method.layers :]:
                block.unfreeze()
        return
    model.freeze()
    paths = adapter_paths(model, method)
    for path, module in list(model.named_modules()):
        if path in paths:
            adapted = LoRALinear(module, method)
            replace_module(model, path, adapted)
            mx.eval(adapted.parameters())


def adapter_paths(model: Model, method: LoRAConfig) -> set[str]:
    names = method.modules or projections(model.config)
    first = len(model.layers) - (method.layers or len(model.layers))
    return {
        path
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear))
        and re.fullmatch(r"model[.]layers[.]\d+[.](self_attn|mlp)[.]\w+", path)
        and path.rpartition(".")[2] in names
        and int(path.split(".")[2]) >= first
    }


def check(method: LoRAConfig, config: Config) -> None:
    """Raises InvalidArgumentError if the model lacks the layers or modules."""
    if (method.layers or 0) > config.num_hidden_layers:
        raise InvalidArgumentError(
            f"must be at most {config.num_hidden_layers}, the model's layers, got {method.layers}",
            field="layers",
        )
    names = projections(config)
    if unknown := set(method.modules or ()) - set(names):
        raise InvalidArgumentError(
            f"must be some of {', '.join(names)}, got {min(unknown)!r}", field="modules"
        )


def projections(config: Config) -> tuple[str, ...]:
    """Names of the projections that can have an adapter; not those of experts, which inference
    stacks."""
    return tuple(
        path.rpartition(".")[2]
        for path in config.projections
        if not (config.num_experts and path.startswith("mlp."))
    )


def adapters(model: Model) -> Iterator[tuple[str, LoRALinear]]:
    """Yields the adapters with the paths of their projections."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


def seed_dropout(model: Model, key: mx.array) -> None:
    """Gives each adapter a dropout key derived from `key`.

    A fixed key makes every computation of a layer drop the same inputs, as checkpointing requires.
    """
    modules = [module for _, module in adapters(model) if module.dropout]
    if modules:
        for module, own_key in zip(modules, mx.random.split(key, len(modules)), strict=True):
            module._key = own_key


@contextmanager
def without_adapters(model: Model) -> Iterator[None]:
    """Turns adapters off, which leaves the base model."""
    modules = [module for _, module in adapters(model)]
    for module in modules:
        module.on = False
    try:
        yield
    finally:
        for module in modules:
            module.on = True


def adapter_weights(model: Model, method: LoRAConfig) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Returns the tensors and the configuration of the adapters in mlx-lm's layout."""
    tensors, keys = {}, set()
    first = len(model.layers)
    for path, module in adapters(model):
        for name in ("lora_a", "lora_b", "m"):
            if name in module:
                tensors[f"{path}.{name}"] = module[name]
        _, _, index, key = path.split(".", 3)
        first = min(first, int(index))
        keys.add(key)
    config = {
        "fine_tune_type": method.kind,
        "num_layers": len(model.layers) - first,
        "lora_parameters": {
            "rank": method.rank,
            "scale": method.scale,
            "dropout": method.dropout,
            "keys": sorted(keys),
        },
    }
    return tensors, config
