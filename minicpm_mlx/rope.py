"""Rotary positions: plain, linear, dynamic NTK and longrope.

Where frequencies depend on the length of the text (dynamic NTK, longrope) the reference picks them
anew for each forward pass and leaves keys already cached as they were rotated. This follows it.
"""

from __future__ import annotations

import math

import mlx.core as mx

from .config import Config


class Rope:
    """Rotates queries or keys (B, H, T, D); halves of D are paired, as in the checkpoints."""

    def __init__(self, config: Config):
        scaling = config.rope_scaling
        kind = scaling.kind if scaling else "plain"
        self.kind = kind
        self.head_dim = config.head_dim
        self.theta = config.rope_theta
        self.position_scale = 1.0
        self.amplitude = 1.0
        if scaling and kind == "linear":
            self.position_scale = 1.0 / scaling.factor
        self.trained = config.rotation_threshold or 0
        if scaling and kind == "dynamic":
            self.factor = scaling.factor
        if scaling and kind == "longrope":
            original = scaling.original_max_position_embeddings
            stretch = max(config.max_position_embeddings / original, 1.0)
            self.amplitude = math.sqrt(1 + math.log(stretch) / math.log(original))
            powers = self._powers(mx.array(self.theta))
            self.short = powers * mx.array(scaling.short_factor)
            self.long = powers * mx.array(scaling.long_factor)

    def __call__(self, x: mx.array, offset: int | mx.array, length: int | mx.array) -> mx.array:
        """Rotate `x` (B, H, T, D), whose first position is `offset`, in a text of `length` tokens.

        Both are one number, or one a row (B,).
        """
        if self.amplitude != 1.0:
            x = x * self.amplitude
        freqs = self._frequencies(length)
        if freqs is not None and freqs.ndim == 2:
            return _rotate_rows(x, offset, freqs)
        return mx.fast.rope(
            x,
            self.head_dim,
            traditional=False,
            base=self.theta if freqs is None else None,
            scale=self.position_scale,
            offset=offset,
            freqs=freqs,
        )

    def _frequencies(self, length: int | mx.array) -> mx.array | None:
        """Radians a position, inverted: (D/2), or (B, D/2) for one length a row; None: plain."""
        if self.kind not in ("dynamic", "longrope"):
            return None
        if isinstance(length, int):
            if self.kind == "longrope":
                return self.long if length > self.trained else self.short
            return None if length <= self.trained else self._powers(self._base(mx.array(length)))
        if self.kind == "longrope":
            return mx.where(length[:, None] > self.trained, self.long, self.short)
        return self._powers(self._base(length))

    def _base(self, length: mx.array) -> mx.array:
        """Dynamic NTK's base: it grows once the text is longer than the trained context."""
        stretch = self.factor * length / self.trained - (self.factor - 1)
        exponent = self.head_dim / (self.head_dim - 2)
        return self.theta * mx.maximum(stretch, 1.0) ** exponent

    def _powers(self, base: mx.array) -> mx.array:
        exponents = mx.arange(0, self.head_dim, 2, dtype=mx.float32) / self.head_dim
        return mx.power(base[..., None], exponents)


def _rotate_rows(x: mx.array, offset: int | mx.array, freqs: mx.array) -> mx.array:
    """Rotate each row of `x` (B, H, T, D) by its own `freqs` (B, D/2); mx.fast.rope cannot."""
    steps = mx.arange(x.shape[2], dtype=mx.float32)
    positions = mx.reshape(mx.array(offset), (-1, 1)) + steps  # (B, T)
    angles = positions[:, None, :, None] / freqs[:, None, None, :]  # (B, 1, T, D/2)
    cos, sin = mx.cos(angles), mx.sin(angles)
    left, right = mx.split(x.astype(mx.float32), 2, axis=-1)
    rotated = mx.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return rotated.astype(x.dtype)
