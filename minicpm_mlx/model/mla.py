"""Multi-head latent attention (MiniCPM3): keys and values are projected from one small latent.

The latent is cached, and the rotated part of the key, which all heads share. After DeepSeek-V2,
arXiv 2405.04434; halves of the rotated part are paired, as elsewhere in this family.
"""

from __future__ import annotations

from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from . import kernels
from .attention import Cache, Mask, join_heads, split_heads
from .config import Config
from .kernels.cpu_gemv import SplitLinear
from .modules import AdaptedLinear
from .packing import packing_options
from .rope import Rotation

INNER_EPS = 1e-6
"""Of the norms of latents, whatever rms_norm_eps is: so the reference."""


class LatentAttention(nn.Module):
    """The reference form: keys and values of all positions are computed from their latents."""

    def __init__(self, config: Config):
        super().__init__()
        assert config.mla is not None
        hidden, H, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.heads, self.widths, self.scale = H, config.mla, config.head_dim**-0.5
        self.attention: kernels.Attention = mx.fast.scaled_dot_product_attention
        self.residual_scale = config.residual_scale
        q_rank, kv_rank, rope = config.mla.q_lora_rank, config.mla.kv_lora_rank, config.rope_dim
        up = config.mla.qk_nope_head_dim + config.value_dim
        self.q_a_proj = nn.Linear(hidden, q_rank, bias=bias)
        self.q_a_layernorm = nn.RMSNorm(q_rank, INNER_EPS)
        self.q_b_proj = nn.Linear(q_rank, H * config.head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, kv_rank + rope, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(kv_rank, INNER_EPS)
        self.kv_b_proj = nn.Linear(kv_rank, H * up, bias=False)
        self.o_proj = nn.Linear(H * config.value_dim, hidden, bias=bias)

    def __call__(self, x: mx.array, rotate: Rotation, mask: Mask, cache: Cache | None) -> mx.array:
        nope = self.widths.qk_nope_head_dim
        q = split_heads(self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))), self.heads)
        q = mx.concatenate([q[..., :nope], rotate(q[..., nope:])], axis=-1)  # (B, H, T, D)
        latent, k_rope = mx.split(self.kv_a_proj_with_mqa(x), [self.widths.kv_lora_rank], axis=-1)
        latent, k_rope = self.kv_a_layernorm(latent)[:, None], rotate(k_rope[:, None])
        if cache is not None:
            k_rope, latent = cache.update_and_fetch(k_rope, latent)  # (B, 1, S, width of each)
        kv = split_heads(self.kv_b_proj(latent[:, 0]), self.heads)
        k, v = with_rope(kv[..., :nope], k_rope), kv[..., nope:]  # (B, H, S, D or value width)
        out = self.attention(q, k, v, scale=self.scale, mask=mask)
        return self.o_proj(join_heads(out)) * self.residual_scale


class FusedLatentAttention(nn.Module):
    """The inference form.

    A few queries are projected into the space of latents, which then serve as keys and as values
    without being projected themselves. For many queries it is less work to compute keys and values.
    """

    PARTS: ClassVar = {
        "down_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
        "q_b_proj": ("q_b_proj",),
        "up.layer": ("kv_b_proj",),
        "o_proj": ("o_proj",),
    }
    """As of FusedAttention; the rows of "up.layer" are in another order."""

    def __init__(self, attention: LatentAttention, down: nn.Module, out: nn.Module):
        """`down` is q_a_proj and kv_a_proj_with_mqa in one, `out` is o_proj in its fused form."""
        super().__init__()
        self.heads, self.widths, self.scale = attention.heads, attention.widths, attention.scale
        self.attention = kernels.attention()
        self.down_proj, self.q_b_proj, self.o_proj = down, attention.q_b_proj, out
        self.q_a_layernorm, self.kv_a_layernorm = attention.q_a_layernorm, attention.kv_a_layernorm
        nope, rank, value = (
            self.widths.qk_nope_head_dim,
            self.widths.kv_lora_rank,
            self.widths.v_head_dim,
        )
        self.up = LatentUp(attention.kv_b_proj, self.heads, nope)
        # Multiplications a key and head: projecting it, against longer products with each query.
        self.few = rank * (nope + value) // max(2 * rank - nope - value, 1)

    def __call__(self, x: mx.array, rotate: Rotation, mask: Mask, cache: Cache | None) -> mx.array:
        nope, q_rank = self.widths.qk_nope_head_dim, self.widths.q_lora_rank
        ends = [q_rank, q_rank + self.widths.kv_lora_rank]
        q, latent, k_rope = mx.split(self.down_proj(x), ends, axis=-1)
        q = split_heads(self.q_b_proj(self.q_a_layernorm(q)), self.heads)  # (B, H, T, D)
        q, q_rope = q[..., :nope], rotate(q[..., nope:])
        latent, k_rope = self.kv_a_layernorm(latent)[:, None], rotate(k_rope[:, None])
        if cache is not None:
            k_rope, latent = cache.update_and_fetch(k_rope, latent)  # (B, 1, S, width of each)
        if x.shape[1] <= self.few:
            q = self.up.project_queries(q)  # (B, H, T, rank)
            out = self.up.project_values(self._mix(q, q_rope, latent, k_rope, mask))
            return self.o_proj(join_heads(out))
        k, v = self.up(latent[:, 0])
        q, k = mx.concatenate([q, q_rope], axis=-1), with_rope(k, k_rope)
        return self.o_proj(join_heads(self.attention(q, k, v, scale=self.scale, mask=mask)))

    def _mix(
        self, q: mx.array, q_rope: mx.array, latent: mx.array, k_rope: mx.array, mask: Mask
    ) -> mx.array:
        """Sum latents (B, 1, S, rank) by their weight for each query of each head: (B, H, T, rank).

        All heads read the same latents, so each product is one for all of them, which MLX's own
        attention would repeat for each head.
        """
        B, H, T, rank = q.shape
        scores = q_rope.reshape(B, 1, H * T, -1) @ k_rope.swapaxes(-1, -2)
        scores = mx.addmm(
            scores, q.reshape(B, 1, H * T, rank), latent.swapaxes(-1, -2), self.scale, self.scale
        )
        scores = hide(scores.reshape(B, H, T, -1), mask)
        weights = mx.softmax(scores, axis=-1, precise=True)
        return (weights.reshape(B, 1, H * T, -1) @ latent).reshape(B, H, T, rank)


class LatentUp(nn.Module):
    """kv_b_proj: latents to keys and values, or queries to latents and mixed latents to values."""

    def __init__(self, layer: nn.Module, heads: int, nope: int):
        """`layer` is used up. Its rows are, for each head, those of its keys and of its values."""
        super().__init__()
        self.layer, self.heads, self.nope = layer, heads, nope
        self.key_rows = heads * nope
        order = mx.argsort(self.rows)
        for name in layer:  # rows of the weight, and of all that goes with it
            layer[name] = layer[name][order]

    @property
    def rows(self) -> mx.array:
        """The row here of each row of kv_b_proj: here all keys' come before all values'."""
        out = self._parts()[0].weight.shape[0]
        row, values = mx.arange(out), out // self.heads - self.nope
        head, part = row // (self.nope + values), row % (self.nope + values)
        value = self.key_rows + head * values + part - self.nope
        return mx.where(part < self.nope, head * self.nope + part, value)

    def __call__(self, latent: mx.array) -> tuple[mx.array, mx.array]:
        """Project latents (B, S, rank) to keys and values (B, H, S, their width)."""
        k, v = mx.split(self.layer(latent), [self.key_rows], axis=-1)
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def project_queries(self, q: mx.array) -> mx.array:
        """Project q (B, H, T, nope) to (B, H, T, rank), whose product with a latent is q's with its
        key."""
        layer, adapter = self._parts()
        rows = slice(self.key_rows)
        if adapter is None:
            return self._multiply(q, layer, rows, transpose=False)
        if "gain" in adapter:
            q = q * adapter.gain[rows].reshape(self.heads, 1, -1)
        b = adapter.b[:, rows].reshape(-1, self.heads, 1, q.shape[-1])  # (rank, H, 1, nope)
        change = (q @ b.transpose(1, 3, 0, 2)[..., 0]) @ adapter.a.T
        return self._multiply(q, layer, rows, transpose=False) + change

    def project_values(self, mixed: mx.array) -> mx.array:
        """Project weighted sums of latents (B, H, T, rank) to those of values (B, H, T, v)."""
        layer, adapter = self._parts()
        rows = slice(self.key_rows, None)
        out = self._multiply(mixed, layer, rows, transpose=True)
        if adapter is None:
            return out
        b = adapter.b[:, rows].reshape(-1, self.heads, out.shape[-1]).swapaxes(0, 1)
        out = out + (mixed @ adapter.a) @ b
        return out * adapter.gain[rows].reshape(self.heads, 1, -1) if "gain" in adapter else out

    def _parts(self) -> tuple[nn.Module, AdaptedLinear | None]:
        adapter = self.layer if isinstance(self.layer, AdaptedLinear) else None
        layer = adapter.layer if adapter else self.layer
        return layer.linear if isinstance(layer, SplitLinear) else layer, adapter

    def _multiply(self, x: mx.array, layer: nn.Module, rows: slice, transpose: bool) -> mx.array:
        """Multiply x (B, H, T, ...) by each head's rows of the weight: (H, rows, rank)."""
        weight = layer.weight[rows]
        weight = weight.reshape(self.heads, -1, weight.shape[-1])
        if not isinstance(layer, nn.QuantizedLinear):
            return x @ (weight.swapaxes(-1, -2) if transpose else weight)
        options = {"transpose": transpose, **packing_options(layer)}
        for name in ("scales", "biases"):
            if name in layer:
                options[name] = layer[name][rows].reshape(self.heads, weight.shape[1], -1)
        return mx.quantized_matmul(x, weight, **options)


def hide(scores: mx.array, mask: Mask) -> mx.array:
    """Make scores (B, H, T, S) of what `mask` hides so low that they weigh nothing.

    Not infinite: a row that sees nothing, padding, would become NaN.
    """
    if mask is None:
        return scores
    if isinstance(mask, str):  # "causal"
        T, S = scores.shape[-2:]
        mask = mx.arange(S - T, S)[:, None] >= mx.arange(S)
    return mx.where(mask, scores, mx.finfo(scores.dtype).min)


def with_rope(k: mx.array, k_rope: mx.array) -> mx.array:
    """Append to keys (B, H, S, nope) the rotated part (B, 1, S, rope) that heads share."""
    shared = mx.broadcast_to(k_rope, (*k.shape[:-1], k_rope.shape[-1]))
    return mx.concatenate([k, shared], axis=-1)
