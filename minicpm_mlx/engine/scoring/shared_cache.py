"""Keys and values that texts were read over, each beginning kept once for all that share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ...model.transformer import Mask

__all__ = ["KVSegment", "SharedKVCache", "SharedLayerCache"]


@dataclass
class KVSegment:
    """Keys and values of a pass: of each layer (R, K, S, D)."""

    layers: list[tuple[mx.array, mx.array]]
    lengths: list[int]
    """Of the rows; what is beyond is padding."""


@dataclass
class SharedKVCache:
    """What rows were read over, one row a text."""

    segments: list[tuple[KVSegment, list[int]]]
    """Each with the row in it of every text."""
    rows: int

    @property
    def offsets(self) -> list[int]:
        return [sum(s.lengths[at[row]] for s, at in self.segments) for row in range(self.rows)]

    def of(self, rows: Sequence[int]) -> SharedKVCache:
        """The past of rows that go on from `rows`."""
        picked = [(segment, [at[row] for row in rows]) for segment, at in self.segments]
        return SharedKVCache(picked, len(rows))

    def mask(self, steps: int) -> mx.array | str | None:
        """What `steps` new positions see, (B, 1, T, S + T); None or "causal" where all is plain."""
        if not self.segments:
            return "causal" if steps > 1 else None
        parts = []
        for segment, at in self.segments:
            known = mx.array([segment.lengths[row] for row in at])[:, None, None, None]
            seen = mx.arange(segment.layers[0][0].shape[2]) < known  # (B, 1, 1, S)
            parts.append(mx.broadcast_to(seen, (self.rows, 1, steps, seen.shape[-1])))
        own = mx.arange(steps)[:, None] >= mx.arange(steps)
        parts.append(mx.broadcast_to(own, (self.rows, 1, steps, steps)))
        return mx.concatenate(parts, axis=-1)


class SharedLayerCache:
    """A layer's cache for one pass, with the interface of mlx-lm's."""

    def __init__(
        self, past: SharedKVCache, number: int, offset: int | mx.array, mask: Mask
    ) -> None:
        self.past, self.number, self.offset, self.mask = past, number, offset, mask
        self.new: tuple[mx.array, mx.array] | None = None

    def make_mask(
        self, steps: int, return_array: bool = False, window_size: int | None = None
    ) -> Mask:
        return self.mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.new = keys, values
        if not self.past.segments:
            return keys, values
        return self._after(0, keys), self._after(1, values)

    def _after(self, which: int, new: mx.array) -> mx.array:
        parts = []
        for segment, at in self.past.segments:
            array = segment.layers[self.number][which]
            if array.shape[0] == 1:
                parts.append(mx.broadcast_to(array, (len(at), *array.shape[1:])))
            else:
                parts.append(array[mx.array(at)])
        return mx.concatenate([*parts, new], axis=2)
