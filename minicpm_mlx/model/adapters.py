"""LoRA and DoRA adapters on a loaded model, applied and removed without touching its weights."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..arguments import printable
from ..errors import WeightsError
from .base_form import ROUNDING, BaseForm
from .fused import ConcatenatedLinear, FusedModel, ScaledLinear
from .kernels.cpu_gemv import SplitLinear
from .mla import FusedLatentAttention
from .modules import AdaptedLinear, at, replace_module
from .packing import dequantized_weight
from .transformer import Model


@dataclass(frozen=True)
class ProjectionSlice:
    """Where a model holds a projection of the checkpoint: rows of the output of a layer."""

    path: str
    """The layer's."""
    rows: slice | mx.array
    """A slice, or the number of each."""
    outputs: int
    inputs: int
    scale: float = 1.0
    """Multiplier of the output that the layer's weights contain."""


def apply_adapter(model: Model | FusedModel, adapter: Adapter | None) -> None:
    """Replace the adapter of `model` by `adapter`; None removes it.

    WeightsError if it does not fit; the model is then unchanged.
    """
    changes = {} if adapter is None else locate_deltas(model, adapter)
    for path, module in list(model.named_modules()):
        if type(module) is AdaptedLinear:
            replace_module(model, path, module.layer)
    modules = dict(model.named_modules())
    norm = model.model.norm if isinstance(model, Model) else model.norm
    for path, deltas in changes.items():
        replace_module(model, path, _adapted(modules[path], deltas, norm.weight.dtype))
    mx.eval(model.parameters())
    model.adapter = adapter.digest if adapter else None


def share_weights(model: Model | FusedModel) -> Model | FusedModel:
    """Return a model with the same arrays, without an adapter, that can get one of its own."""
    copied: Model | FusedModel = _copy_modules(model)
    apply_adapter(copied, None)
    return copied


def _copy_modules(node: Any) -> Any:
    """Copy the modules in a part of a model, not their arrays."""
    if isinstance(node, nn.Module):
        module = copy(node)
        for name, value in node.items():
            module[name] = _copy_modules(value)
        return module
    if isinstance(node, list | tuple):
        return type(node)(map(_copy_modules, node))
    if isinstance(node, dict):
        return {name: _copy_modules(value) for name, value in node.items()}
    return node


def locate_deltas(
    model: Model | FusedModel, adapter: Adapter
) -> dict[str, list[tuple[ProjectionSlice, LoRADelta]]]:
    """Return the deltas of each layer of `model` by its path; WeightsError if they do not fit."""
    projections = find_projections(model)
    changes = defaultdict(list)
    for module, delta in adapter.deltas.items():
        projection = projections.get(module)
        if projection is None:
            raise WeightsError(
                f"{adapter.folder}: changes {printable(module)}, which is no matrix of this model "
                "that an adapter can be put on; is it another model's?"
            )
        shape = (delta.a.shape[0], delta.b.shape[1])
        expected = (projection.inputs, projection.outputs)
        magnitude_fits = delta.magnitude is None or delta.magnitude.size == expected[1]
        if shape != expected or not magnitude_fits:
            raise WeightsError(
                f"{adapter.folder}: {printable(module)} goes from {shape[0]} to {shape[1]} numbers "
                f"and this model's from {expected[0]} to {expected[1]}; is it another model's?"
            )
        changes[projection.path].append((projection, delta))
    return changes


def _adapted(
    layer: nn.Module, deltas: list[tuple[ProjectionSlice, LoRADelta]], dtype: mx.Dtype
) -> AdaptedLinear:
    """Merge the deltas of a layer into one pair of matrices."""
    out, inputs = shape_of(layer)
    deltas = [(p, replace(d, a=mx.pad(d.a, [(0, inputs - p.inputs), (0, 0)]))) for p, d in deltas]
    a = mx.concatenate([delta.a for _, delta in deltas], axis=1)
    b, gain = mx.zeros((a.shape[1], out)), mx.ones((out,))
    row = 0
    for projection, unscaled in deltas:
        delta, rows = unscaled.times(projection.scale), projection.rows
        rank = len(delta.b)
        b[row : row + rank, rows] = delta.b
        row += rank
        if delta.magnitude is not None:
            merged = dense(layer)[rows] + (delta.a @ delta.b).T  # (out, in)
            gain[rows] = delta.magnitude / mx.linalg.norm(merged, axis=1)
    adapted = AdaptedLinear(layer, a.astype(dtype), b.astype(dtype))
    if any(delta.magnitude is not None for _, delta in deltas):
        adapted.gain = gain.astype(dtype)
        bias = layer(mx.zeros((1, inputs), dtype))[0]
        if bias.any().item():
            adapted.bias = bias * (1 - adapted.gain)
    return adapted


def find_projections(model: Model | FusedModel) -> dict[str, ProjectionSlice]:
    """Return where `model` holds each projection of the checkpoint, by its path there."""
    projections: dict[str, ProjectionSlice] = {}

    def add(
        path: str,
        layer: nn.Module,
        names: dict[str, int],
        scale: float = 1.0,
        inputs: int | None = None,
    ) -> None:
        outputs, width = shape_of(layer)
        padding = max(outputs - sum(names.values()), 0) // len(names)  # see layout.py
        start = 0
        for name, rows in names.items():
            projections[name] = ProjectionSlice(
                path, slice(start, start + rows), rows, inputs or width, scale
            )
            start += rows + padding

    if isinstance(model, Model):
        adapted = tuple(f"{p}." for p, m in model.named_modules() if type(m) is AdaptedLinear)
        forms = (nn.Linear, nn.QuantizedLinear, AdaptedLinear)
        for path, module in model.named_modules():
            if isinstance(module, forms) and not path.startswith(adapted):
                add(path, module, {path: shape_of(module)[0]})
        return projections
    config = model.config
    if not config.tie_word_embeddings:
        head = {"lm_head": config.vocab_size}
        add("lm_head", model.lm_head, head, inputs=config.hidden_size)
    scale = config.residual_scale / config.scale_emb
    for number, block in enumerate(model.layers):
        for place in ("self_attn", "mlp"):
            for joined, parts in getattr(block[place], "PARTS", {}).items():
                names = {f"{place}.{part}": config.projections[f"{place}.{part}"] for part in parts}
                add(
                    f"layers.{number}.{place}.{joined}",
                    at(block[place], joined),
                    {f"model.layers.{number}.{name}": out for name, (_, out) in names.items()},
                    scale if parts[0] in ("o_proj", "down_proj") else 1.0,
                    names[f"{place}.{parts[0]}"][0],
                )
        if isinstance(up := block.self_attn, FusedLatentAttention):
            name = f"model.layers.{number}.self_attn.kv_b_proj"
            projections[name] = replace(projections[name], rows=up.up.rows)
    return projections


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """Return the outputs and inputs of a projection of any form."""
    shapes = []
    for leaf, _ in _leaves(layer):
        out, width = leaf.weight.shape
        packed = isinstance(leaf, nn.QuantizedLinear)
        shapes.append((out, width * 32 // leaf.bits if packed else width))
    return sum(out for out, _ in shapes), shapes[0][1]


def dense(layer: nn.Module) -> mx.array:
    """Return the matrix (out, in) of a projection in float32, without its adapter."""
    blocks = []
    for leaf, scale in _leaves(layer):
        weight = leaf.weight
        if isinstance(leaf, nn.QuantizedLinear):
            weight = dequantized_weight(leaf)
        blocks.append(weight.astype(mx.float32) * scale)
    return mx.concatenate(blocks)


def _leaves(layer: nn.Module) -> list[tuple[nn.Module, float]]:
    """Return the plain or quantized layers of a projection, each with its multiplier."""
    if isinstance(layer, ConcatenatedLinear):
        return [leaf for part in layer.parts for leaf in _leaves(part)]
    if isinstance(layer, ScaledLinear):
        return [(leaf, scale * layer.scale) for leaf, scale in _leaves(layer.layer)]
    if isinstance(layer, AdaptedLinear):
        return _leaves(layer.layer)
    return _leaves(layer.linear) if isinstance(layer, SplitLinear) else [(layer, 1.0)]


@dataclass(frozen=True, kw_only=True)
class LoRADelta:
    """An adapter's change of a projection W (out, in): W x + b (a x)."""

    a: mx.array
    """(in, rank)"""
    b: mx.array
    """(rank, out), the adapter's scale included."""
    magnitude: mx.array | None = None
    """(out,): in DoRA, the length to which each row of W + ba is scaled."""

    def times(self, factor: float) -> LoRADelta:
        """The same change of `factor` times the projection."""
        magnitude = None if self.magnitude is None else self.magnitude * factor
        return replace(self, b=self.b * factor, magnitude=magnitude)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter as read from its folder."""

    folder: Path
    deltas: dict[str, LoRADelta]
    """By the projection's path in the checkpoint, such as model.layers.0.self_attn.q_proj."""
    digest: str
    """Hash of its files, and of what its deltas were rescaled by."""
    form: BaseForm | None = None
    """Of the model that it fits; None: its files do not say."""
    bases: tuple[str, ...] = ()
    """Names of the model it was trained on: cards, folders, repositories."""


def rescaled(adapter: Adapter, source: BaseForm, target: BaseForm) -> Adapter:
    """The adapter of a model in the form `source`, for the same model in the form `target`.

    WeightsError naming both if they cannot be forms of one model.
    """
    mine, its = source.recognised(target), target.recognised(source)
    if not mine.same_model(its):
        raise WeightsError(
            f"{adapter.folder}: was trained on a model in {source}, and this one is in {target}; "
            "they are no two forms of one model, so its changes cannot be rescaled; expected the "
            "model it was trained on, or a conversion of that"
        )
    factors = {module: its.factor(module) / mine.factor(module) for module in adapter.deltas}
    factors = {m: f for m, f in factors.items() if not math.isclose(f, 1.0, rel_tol=ROUNDING)}
    if not factors:
        return replace(adapter, form=its)
    deltas = {m: delta.times(factors.get(m, 1.0)) for m, delta in adapter.deltas.items()}
    content = f"{adapter.digest} {sorted(factors.items())}"
    digest = hashlib.sha256(content.encode()).hexdigest()[:32]
    return replace(adapter, deltas=deltas, digest=digest, form=its)
