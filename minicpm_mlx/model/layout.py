"""Layouts of the inference form that compute the same with other kernels.

`wide` pads with zeros what a product reads to a multiple of the step of MLX's fast kernel (see
kernels/qmv_rule.py), without a kernel more. "inner": gate and up have zero rows, so that down_proj
reads zeros. "all": the residual stream carries zero columns too, from the embedding to the last
norm; only o_proj still reads the heads as they are. Norms divide by the true width: with D of E
columns used, rms over E columns is sqrt(D / E) of that over D. `group_size` repeats scales for
smaller groups.
The weights on disk and the logits' shape are as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .. import device
from .fused import AddNorm, FusedAttention, FusedMLP, FusedModel
from .kernels import qmv_rule
from .mla import FusedLatentAttention
from .modules import replace_module

PLAIN = (nn.Linear, nn.Embedding, nn.QuantizedLinear, nn.QuantizedEmbedding)
PACKED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


WIDE = ("inner", "all")


@dataclass(frozen=True, kw_only=True)
class Layout:
    wide: str | None = None
    """Of WIDE: the widths that are padded with zeros."""
    group_size: int | None = None
    """Weights that share a scale; None: as stored. Larger groups than stored stay as they are."""


def apply_layout(model: FusedModel, layout: Layout) -> None:
    """Change `model`, without an adapter, to `layout`; what cannot be stays as it is."""
    if layout.group_size is not None:
        for _, layer in list(model.named_modules()):
            _regroup(layer, layout.group_size)
    if layout.wide is not None and can_widen(model, layout.wide):
        _widen(model, layout.wide)
    pad_head_rows(model)
    mx.eval(model.parameters())


def can_widen(model: FusedModel, wide: str) -> bool:
    """Whether every product is of a kind whose width can change, and these widths are not fit."""
    attention = FusedAttention if wide == "all" else (FusedAttention, FusedLatentAttention)
    return (
        all(isinstance(block.self_attn, attention) for block in model.layers)
        and all(type(block.mlp) is FusedMLP for block in model.layers)
        and all(type(layer) in PLAIN for _, layer in _products(model, wide))
        and _missing(model, wide)[0 if wide == "all" else 1] > 0
    )


def can_regroup(model: FusedModel, group_size: int) -> bool:
    """Whether some matrix has larger groups."""
    return any(_finer(layer, group_size) > 1 for _, layer in model.named_modules())


def pad_head_rows(model: FusedModel) -> None:
    """Pad the head's rows to a multiple of 8 where MLX then takes its fast kernel as it is; the
    model cuts the logits of those rows off."""
    path = "embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    head = model[path]
    if type(head) not in PACKED or not device.on_metal():
        return
    outputs, inputs = head.weight.shape[0], head.weight.shape[1] * 32 // head.bits
    missing, mlx = -outputs % qmv_rule.ROWS, device.mlx_version()
    if missing and qmv_rule.choose(outputs + missing, inputs, head.bits, mlx) == qmv_rule.FAST:
        replace_module(model, path, _padded(head, outputs=missing))


def _products(model: FusedModel, wide: str) -> Iterator[tuple[str, nn.Module]]:
    """The matrices whose widths change, by path."""
    parts: list[tuple[str, Iterable[str]]] = [("mlp", FusedMLP.PARTS)]
    if wide == "all":
        parts.append(("self_attn", FusedAttention.PARTS))
        yield "embed_tokens", model.embed_tokens
        if not model.config.tie_word_embeddings:
            yield "lm_head", model.lm_head
    for number, block in enumerate(model.layers):
        for part, names in parts:
            for name in names:
                yield f"layers.{number}.{part}.{name}", block[part][name]


def _missing(model: FusedModel, wide: str) -> tuple[int, int]:
    """Zero columns of the residual stream, and zero rows of gate and of up."""
    mlx, config = device.mlx_version(), model.config
    bits = [layer.bits for _, layer in _products(model, wide) if type(layer) in PACKED]
    step = max((qmv_rule.step(n, mlx) for n in bits), default=1)
    return -config.hidden_size % step if wide == "all" else 0, -config.intermediate_size % step


def _widen(model: FusedModel, wide: str) -> None:
    more, more_inner = _missing(model, wide)
    for path, layer in list(_products(model, wide)):
        name = path.rpartition(".")[2]
        if name == "gate_up_proj":  # each of the two is padded
            layer = _padded(layer, outputs=more_inner, parts=2)
        outputs = more if name in ("o_proj", "down_proj") else 0
        inputs = {"o_proj": 0, "down_proj": more_inner}.get(name, more)
        replace_module(model, path, _padded(layer, outputs=outputs, inputs=inputs))
    if more:
        for holder, name in _norms(model):
            holder[name] = _widened_norm(holder[name], more)


def _norms(model: FusedModel) -> Iterator[tuple[nn.Module, str]]:
    """The modules that hold norms of the residual stream, and their names there."""
    yield model, "norm"
    for block in model.layers:
        yield from ((block, "input_layernorm"), (block, "post_attention_layernorm"))


def _widened_norm(norm: AddNorm, more: int) -> AddNorm:
    """The norm of rows that have so many more zero columns, which it multiplies by zero."""
    width = norm.weight.size
    share = width / (width + more)
    weight = mx.pad(norm.weight.astype(mx.float32) * share**0.5, (0, more))
    return AddNorm(weight.astype(norm.weight.dtype), norm.eps * share)


def _padded(layer: nn.Module, *, outputs: int = 0, inputs: int = 0, parts: int = 1) -> nn.Module:
    """`layer`, which is used up, with so many more zero rows after each of `parts` equal parts of
    its rows, and so many more zero columns."""
    for name in list(layer.keys()):
        array: mx.array = layer[name]
        if array.ndim == 1:  # a bias
            rows = array.reshape(parts, -1)
            layer[name] = mx.pad(rows, [(0, 0), (0, outputs)]).reshape(-1)
            continue
        columns = inputs
        if type(layer) in PACKED:
            packed = name == "weight"
            columns = inputs * layer.bits // 32 if packed else inputs // layer.group_size
        rows = array.reshape(parts, array.shape[0] // parts, -1)
        rows = mx.pad(rows, [(0, 0), (0, outputs), (0, columns)])
        layer[name] = rows.reshape(-1, rows.shape[-1])
    return layer


def _finer(layer: nn.Module, group_size: int) -> int:
    """How many groups of that size a group of `layer` becomes; 1 where it stays."""
    packed = type(layer) in PACKED and layer.mode == "affine"
    return max(layer.group_size // group_size, 1) if packed else 1


def _regroup(layer: nn.Module, group_size: int) -> None:
    times = _finer(layer, group_size)
    if times > 1:
        for name in ("scales", "biases"):
            layer[name] = mx.repeat(layer[name], times, axis=-1)
        layer.group_size = group_size
