"""Low-rank adapters that are trained: LoRA, rsLoRA and DoRA.

Hu et al., arXiv 2106.09685; Kalajdzievski, arXiv 2312.03732; Liu et al., arXiv 2402.09353. They
go on the model in the form it is read in, whose names they are saved under.
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

from ..arguments import at_least_one, number, shown
from ..errors import InvalidArgumentError
from ..model.adapters import dense, shape_of
from ..model.config import Config
from ..model.packing import replace
from ..model.transformer import Model

KINDS = ("lora", "dora", "full")

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which parameters are trained."""

    kind: str = "lora"
    """`lora`, `dora`, or `full`: all of them, with no adapter."""
    rank: int = 8
    alpha: float | None = None
    """The product of the two matrices is multiplied by alpha / rank; by default twice the rank."""
    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA)."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is left out, in training alone."""
    layers: int | None = None
    """How many, counted from the last; None: all."""
    modules: tuple[str, ...] | None = None
    """Names of projections; None: all of attention and feed-forward (of experts none)."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidArgumentError(
                f"method must be one of {', '.join(KINDS)}, got {shown(self.kind)}"
            )
        at_least_one("rank", self.rank)
        if self.layers is not None:
            at_least_one("num-layers", self.layers)
        if not 0 <= number("dropout", self.dropout) < 1:
            raise InvalidArgumentError(f"dropout must be in [0, 1), got {self.dropout:g}")
        if self.alpha is not None and not 0 < number("alpha", self.alpha) < math.inf:
            raise InvalidArgumentError(f"alpha must be more than 0, got {self.alpha:g}")
        if self.kind != "full":
            return
        for option in fields(self):
            known = option.name in ("kind", "layers")
            if not known and getattr(self, option.name) != option.default:
                raise InvalidArgumentError(
                    f"{option.name.replace('_', '-')} is for adapters; full trains every matrix"
                )

    @property
    def scale(self) -> float:
        """By which the product of the two matrices is multiplied."""
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


class LoRALinear(nn.Module):
    """A projection with an adapter: layer(x) + scale (x a) b, and in DoRA each output given the
    length `m`, which is learned, in the place of its row's."""

    def __init__(self, layer: nn.Module, method: LoRAConfig):
        super().__init__()
        out, width = shape_of(layer)
        self.layer, self.scale, self.on = layer, method.scale, True
        self.dropout = method.dropout
        self._key = mx.random.key(0)
        self.lora_a = mx.random.uniform(-(width**-0.5), width**-0.5, (width, method.rank))
        self.lora_b = mx.zeros((method.rank, out))
        if method.kind == "dora":
            self._lengths = mx.square(dense(layer)).sum(axis=1)  # squared, of the rows
            self.m = mx.sqrt(self._lengths)

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
        """Of W + scale (a b)T (out,), without making it; what the layer is given is in `dtype`."""
        bias = self.layer.get("bias")
        through = self.layer(self.lora_a.T.astype(dtype))  # W a, transposed: (rank, out)
        if bias is not None:
            through = through - bias
        b = self.scale * self.lora_b
        products = (through.astype(mx.float32) * b).sum(axis=0)
        squares = ((self.lora_a.T @ self.lora_a @ b) * b).sum(axis=0)
        return mx.sqrt(mx.maximum(self._lengths + 2 * products + squares, 1e-12))


def prepare_model(model: Model, method: LoRAConfig) -> None:
    """Freeze `model` but for what `method` trains; adapters, in float32, are put on.

    InvalidArgumentError: no such layers or modules.
    """
    check(method, model.config)
    blocks = model.layers
    if method.kind == "full":
        _refuse_packed(model)
        if method.layers is not None:
            model.freeze()
            for block in blocks[-method.layers :]:
                block.unfreeze()
        return
    model.freeze()
    chosen = targets(model, method)
    for path, module in list(model.named_modules()):
        if path in chosen:
            adapted = LoRALinear(module, method)
            replace(model, path, adapted)
            mx.eval(adapted.parameters())


def targets(model: Model, method: LoRAConfig) -> set[str]:
    """Paths of the projections that get an adapter."""
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
    """InvalidArgumentError where a model has no such layers or modules."""
    if (method.layers or 0) > config.num_hidden_layers:
        raise InvalidArgumentError(
            f"num-layers: this model has {config.num_hidden_layers} layers, got {method.layers}"
        )
    names = projections(config)
    if strange := set(method.modules or ()) - set(names):
        raise InvalidArgumentError(
            f"modules: expected some of {', '.join(names)}, got {min(strange)!r}"
        )


def projections(config: Config) -> tuple[str, ...]:
    """Names of those that can have an adapter: experts, which inference stacks, can not."""
    return ATTENTION if config.num_experts else ATTENTION + MLP


def _refuse_packed(model: Model) -> None:
    if any("scales" in module for _, module in model.named_modules()):
        raise InvalidArgumentError(
            "full training needs unpacked weights, and this model is quantized; train an adapter "
            "(lora or dora), or take the model it was made from"
        )


def adapters(model: Model) -> Iterator[tuple[str, LoRALinear]]:
    """Those on `model`, by the path of what they are on."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


def seed_dropout(model: Model, key: mx.array) -> None:
    """Have the adapters on `model` leave out inputs as `key` says, each others.

    It is the same however often they are computed, as checkpointing needs.
    """
    found = [module for _, module in adapters(model) if module.dropout]
    for module, own in zip(found, mx.random.split(key, len(found)) if found else (), strict=True):
        module._key = own


@contextmanager
def without_adapters(model: Model) -> Iterator[None]:
    """The model as it was, for the time being."""
    found = [module for _, module in adapters(model)]
    for module in found:
        module.on = False
    try:
        yield
    finally:
        for module in found:
            module.on = True


def adapter_weights(model: Model, method: LoRAConfig) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The adapters on `model` in mlx-lm's layout: tensors, and the configuration beside them."""
    tensors, keys = {}, set()
    first = len(model.layers)
    for path, module in adapters(model):
        for name in ("lora_a", "lora_b", "m"):
            if name in module:
                tensors[f"{path}.{name}"] = module[name]
        _, _, number, inside = path.split(".", 3)
        first = min(first, int(number))
        keys.add(inside)
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
