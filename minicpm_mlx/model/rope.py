"""Rotary positions: plain, linear, dynamic NTK and longrope.

Where frequencies depend on the length of the text (dynamic NTK, longrope), each forward pass picks
them anew and cached keys stay as they were rotated, as in the reference implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from .. import device
from .config import Config

Rotation = Callable[[mx.array], mx.array]
"""Rotates queries or keys (B, H, T, D)."""


class Rope:
    """Creates rotations of queries and keys; halves of D are paired, as in the checkpoints."""

    def __init__(self, config: Config):
        scaling = config.rope_scaling
        kind = scaling.kind if scaling else "plain"
        self.kind = kind
        self.width = config.rope_dim
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
            mx.eval(self.short, self.long)  # a lazy array is bound to this thread

    def at(self, offset: int | mx.array, steps: int, length: int | mx.array) -> Rotation:
        """Return the rotation of `steps` positions from `offset` on, in a text of `length` tokens.

        Offset and length are one number, or one a row (B,). The rotation takes queries or keys
        (B, H, steps, D) of any layer.
        """
        freqs = self._frequencies(length)
        if (freqs is not None and freqs.ndim == 2) or device.on_cpu():
            return self._by_table(offset, steps, freqs)

        def rotate(x: mx.array) -> mx.array:
            return mx.fast.rope(
                x if self.amplitude == 1.0 else x * self.amplitude,
                self.width,
                traditional=False,
                base=self.theta if freqs is None else None,
                scale=self.position_scale,
                offset=offset,
                freqs=freqs,
            )

        return rotate

    def _by_table(self, offset: int | mx.array, steps: int, freqs: mx.array | None) -> Rotation:
        """Rotate by sines and cosines that are computed once for all layers.

        mx.fast.rope takes no frequencies by row, and on a CPU it is a dozen operations, no kernel.
        """
        if freqs is None:
            freqs = self._powers(mx.array(self.theta))
        positions = mx.array(offset).reshape(-1, 1) + mx.arange(steps)  # (B or 1, T)
        scaled = positions.astype(mx.float32) * self.position_scale
        angles = scaled[:, None, :, None] / freqs.reshape(-1, 1, 1, self.width // 2)
        cos, sin = mx.cos(angles) * self.amplitude, mx.sin(angles) * self.amplitude
        cos = mx.concatenate([cos, cos], axis=-1)  # (B or 1, 1, T, D)
        sin = mx.concatenate([-sin, sin], axis=-1)

        def rotate(x: mx.array) -> mx.array:
            left, right = mx.split(x, 2, axis=-1)
            return (x * cos + mx.concatenate([right, left], axis=-1) * sin).astype(x.dtype)

        return rotate

    def _frequencies(self, length: int | mx.array) -> mx.array | None:
        """Return inverse frequencies (D/2,), or (B, D/2) for one length a row; None: plain."""
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
        """Return dynamic NTK's base, which grows beyond the trained context."""
        stretch = self.factor * length / self.trained - (self.factor - 1)
        exponent = self.width / (self.width - 2)
        return self.theta * mx.maximum(stretch, 1.0) ** exponent

    def _powers(self, base: mx.array) -> mx.array:
        exponents = mx.arange(0, self.width, 2, dtype=mx.float32) / self.width
        return mx.power(base[..., None], exponents)
