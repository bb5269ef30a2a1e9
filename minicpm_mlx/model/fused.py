"""The inference form of a model: muP folded into the weights, projections concatenated.

- The residual stream is carried in units of `scale_emb`: RMSNorm does not see the scale of its
  input once eps is divided by scale_emb², so the embedding stays as stored and can stay shared
  with the head, and nothing multiplies it.
- o_proj and down_proj absorb residual_scale / scale_emb (in scales and biases when quantized), and
  the last norm absorbs the logit divisor. float16 no longer overflows.
- q, k and v become one matrix, gate and up another, and the experts of a mixture are stacked.
- A branch's output is added where the sum is normalized, in one kernel where there is one.
The result is a Llama with fewer, larger kernels; tests compare it with the reference model in
`transformer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import device
from . import kernels
from .attention import Attention, Cache, Mask, attend, split_heads
from .config import Config
from .feed_forward import MLP, MoE, route
from .mla import FusedLatentAttention, LatentAttention
from .modules import Pace
from .packing import packing_options
from .rope import Rotation
from .transformer import Block, Model, prepare_pass


class FusedModel(nn.Module):
    """Token ids to logits; same calling convention and, but for rounding, same results as Model."""

    def __init__(self, model: Model):
        super().__init__()
        self.config = model.config
        self.adapter: str | None = None  # digest of the one that apply_adapter() put on
        self.pace = Pace()
        self.rope = model.model.rope
        self.embed_tokens = model.model.embed_tokens
        self.layers: list[FusedBlock] = []
        weight = _times(model.model.norm.weight, 1 / model.config.logit_divisor)
        self.norm = AddNorm(weight, _folded_eps(model.config))
        if not model.config.tie_word_embeddings:
            self.lm_head = model.lm_head

    def __call__(
        self, ids: mx.array, cache: Sequence[Cache] | None = None, length: int | None = None
    ) -> mx.array:
        """Logits (B, T, V) for ids (B, T); see `Model.__call__`."""
        return self.logits(self.hidden(ids, cache, length))

    def hidden(
        self, ids: mx.array, cache: Sequence[Cache] | None = None, length: int | None = None
    ) -> mx.array:
        """Last hidden states (B, T, hidden), divided by the logit divisor."""
        x, delta = self.embed_tokens(ids), None
        rotate, mask, caches = prepare_pass(self.rope, ids, cache, len(self.layers), length)
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            x, delta = layer(x, delta, rotate, mask, layer_cache)
        return self.norm(x, delta)[1]

    def logits(self, hidden: mx.array) -> mx.array:
        """The head: hidden states (..., hidden) to logits (..., V)."""
        head = self.embed_tokens.as_linear if self.config.tie_word_embeddings else self.lm_head
        logits: mx.array = head(hidden)
        return logits[..., : self.config.vocab_size]  # without the rows of a padded layout


def fuse(model: Model) -> FusedModel:
    """Convert `model` to its inference form, using up its layers one by one.

    Peak memory is the result plus one layer; `model` is left empty.
    """
    fused = FusedModel(model)
    mx.eval(fused.parameters())
    while model.layers:
        layer = FusedBlock(model.layers.pop(0), model.config)
        mx.eval(layer.parameters())
        fused.layers.append(layer)
    return fused


class FusedBlock(nn.Module):
    def __init__(self, block: Block, config: Config):
        super().__init__()
        scale = config.residual_scale / config.scale_emb
        self.self_attn = _fuse_attention(block.self_attn, scale)
        self.mlp = _fuse_mlp(block.mlp, scale)
        eps = _folded_eps(config)
        self.input_layernorm = AddNorm(block.input_layernorm.weight, eps)
        self.post_attention_layernorm = AddNorm(block.post_attention_layernorm.weight, eps)

    def __call__(
        self,
        x: mx.array,
        delta: mx.array | None,
        rotate: Rotation,
        mask: Mask,
        cache: Cache | None,
    ) -> tuple[mx.array, mx.array]:
        """Return the residual stream (B, T, hidden), and what is still to be added to it.

        `x` and `delta` are the same of the block before; the first has no `delta`.
        """
        # By key, as MLX's own layers do: in a step of 40 layers a tenth of the host's time.
        x, normed = self["input_layernorm"](x, delta)
        delta = self["self_attn"](normed, rotate, mask, cache)
        x, normed = self["post_attention_layernorm"](x, delta)
        return x, self["mlp"](normed)


class AddNorm(nn.Module):
    """Adds a branch's output to the residual stream; returns the sum, and the sum normalized."""

    def __init__(self, weight: mx.array, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps
        self.add_norm = kernels.add_norm(weight.size, weight.dtype, self.eps)

    def __call__(self, x: mx.array, delta: mx.array | None) -> tuple[mx.array, mx.array]:
        if delta is None:
            return x, mx.fast.rms_norm(x, self.weight, self.eps)
        return self.add_norm(x, delta, self["weight"])


class FusedAttention(nn.Module):
    PARTS: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "o_proj": ("o_proj",)}
    """Projections of the checkpoint whose rows each layer holds, in order."""

    def __init__(self, attention: Attention, scale: float):
        super().__init__()
        self.heads, self.kv_heads = attention.heads, attention.kv_heads
        self.scale = attention.scale
        self.attention = kernels.attention()
        self.qkv_proj = join([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o_proj = scaled(attention.o_proj, scale)

    def __call__(self, x: mx.array, rotate: Rotation, mask: Mask, cache: Cache | None) -> mx.array:
        H, K = self.heads, self.kv_heads
        qkv = split_heads(self["qkv_proj"](x), H + 2 * K)  # (B, H + 2K, T, D)
        qk, v = mx.split(qkv, [H + K], axis=1)
        q, k = mx.split(rotate(qk), [H], axis=1)  # q and k rotate alike, so in one kernel
        return self["o_proj"](attend(q, k, v, self.scale, mask, cache, self.attention))


class FusedMLP(nn.Module):
    PARTS: ClassVar = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    """As of FusedAttention. A mixture has none: stacked experts are no matrices of their own."""

    def __init__(self, mlp: MLP, scale: float):
        super().__init__()
        self.activation = mlp.activation.for_inference()
        self.gate_up_proj = join([mlp.gate_proj, mlp.up_proj])
        self.down_proj = scaled(mlp.down_proj, scale)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = mx.split(self["gate_up_proj"](x), 2, axis=-1)
        return self["down_proj"](self.activation(gate, up))


class FusedMoE(nn.Module):
    """A mixture whose experts are stacked, so that a token meets only those it was routed to."""

    def __init__(self, moe: MoE, scale: float):
        super().__init__()
        self.k, self.gate = moe.k, moe.gate
        self.activation = moe.activation.for_inference()
        self.gate_up = StackedLinear([join([expert.w1, expert.w3]) for expert in moe.experts])
        self.down = StackedLinear([scaled(expert.w2, scale) for expert in moe.experts])

    def __call__(self, x: mx.array) -> mx.array:
        chosen, weights = route(self.gate(x), self.k)  # (B, T, k)
        inner = self.gate_up(x[..., None, None, :], chosen)  # (B, T, k, 1, 2F)
        gate, up = mx.split(inner, 2, axis=-1)
        out = self.down(self.activation(gate, up), chosen).squeeze(-2)  # (B, T, k, hidden)
        return (out * weights[..., None].astype(x.dtype)).sum(axis=-2)


def _fuse_attention(attention: Attention | LatentAttention, scale: float) -> nn.Module:
    if isinstance(attention, Attention):
        return FusedAttention(attention, scale)
    down = join([attention.q_a_proj, attention.kv_a_proj_with_mqa])
    return FusedLatentAttention(attention, down, scaled(attention.o_proj, scale))


def _fuse_mlp(mlp: MLP | MoE, scale: float) -> nn.Module:
    if isinstance(mlp, MLP):
        return FusedMLP(mlp, scale)
    inner: list[nn.Module] = [layer for expert in mlp.experts for layer in (expert.w1, expert.w3)]
    outer: list[nn.Module] = [expert.w2 for expert in mlp.experts]
    if _same_form(inner) and _same_form(outer) and _can_absorb_scale(outer[0]):
        return FusedMoE(mlp, scale)
    mlp.residual_scale = scale
    return mlp


class ConcatenatedLinear(nn.Module):
    """Projections of one input that cannot be one matrix, since their bits differ or one has an
    adapter."""

    def __init__(self, parts: list[nn.Module]):
        super().__init__()
        self.parts = parts

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([part(x) for part in self.parts], axis=-1)


class ScaledLinear(nn.Module):
    """A projection with a scaled output, for layers whose weights cannot absorb the scale.

    Without a bias the input is scaled instead: the raw output of down_proj overflows float16.
    """

    def __init__(self, layer: nn.Module, scale: float):
        super().__init__()
        self.layer, self.scale = layer, scale
        self.biased = any(name.endswith("bias") for name in dict(tree_flatten(layer.parameters())))

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer(x) * self.scale if self.biased else self.layer(x * self.scale)


class StackedLinear(nn.Module):
    """Projections of one form in one array, of which each input row goes through those chosen."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layer = _merge(layers, mx.stack)

    def __call__(self, x: mx.array, chosen: mx.array) -> mx.array:
        """Project x (B, T, 1 or k, 1, in) by layers `chosen` (B, T, k) to (B, T, k, 1, out)."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            weight, dtype = layer.weight.swapaxes(-1, -2), x.dtype
            if device.on_cpu():  # its gather_mm takes float32 only
                x, weight = x.astype(mx.float32), weight.astype(mx.float32)
            return mx.gather_mm(x, weight, rhs_indices=chosen).astype(dtype)
        options = {"rhs_indices": chosen, "transpose": True, **packing_options(layer)}
        return mx.gather_qmm(x, layer.weight, layer.scales, layer.get("biases"), **options)


def join(layers: list[nn.Module]) -> nn.Module:
    """Concatenate the outputs of `layers`, which are used up, into those of one projection."""
    return _merge(layers, mx.concatenate) if _same_form(layers) else ConcatenatedLinear(layers)


def scaled(layer: nn.Module, scale: float) -> nn.Module:
    """Return `layer`, which is used up, with its output multiplied by `scale`."""
    if not _can_absorb_scale(layer):
        return ScaledLinear(layer, scale)
    packed = type(layer) is nn.QuantizedLinear
    for name in ("scales", "biases", "bias") if packed else ("weight", "bias"):
        if name in layer:
            layer[name] = _times(layer[name], scale)
    return layer


def _can_absorb_scale(layer: nn.Module) -> bool:
    """Whether the weights can absorb a scale; the scales of float modes are too coarse."""
    kind = type(layer)
    return kind is nn.Linear or (kind is nn.QuantizedLinear and layer.mode == "affine")


def _same_form(layers: list[nn.Module]) -> bool:
    """Whether the arrays of `layers` can be merged: all dense, or all packed in the same way."""

    def form(layer: nn.Module) -> tuple[Any, ...]:
        packing = tuple(getattr(layer, name, None) for name in ("bits", "group_size", "mode"))
        return (type(layer), packing, frozenset(layer.keys()))

    kinds = {form(layer) for layer in layers}
    return len(kinds) == 1 and type(layers[0]) in (nn.Linear, nn.QuantizedLinear)


def _merge(layers: list[nn.Module], combine: Callable[[list[mx.array]], mx.array]) -> nn.Module:
    merged = layers[0]
    for name in list(merged.keys()):
        merged[name] = combine([layer[name] for layer in layers])
    return merged


def _folded_eps(config: Config) -> float:
    """For a residual stream in units of `scale_emb`."""
    return config.rms_norm_eps / config.scale_emb**2


def _times(array: mx.array, scale: float) -> mx.array:
    """Multiply in float32: a scale rounded to 16 bits would bias every weight alike."""
    return (array.astype(mx.float32) * scale).astype(array.dtype)
