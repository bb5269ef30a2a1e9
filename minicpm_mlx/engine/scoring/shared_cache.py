"""A key-value cache whose rows share their beginnings, each kept once.

A beginning is copied to the rows that share it only for the layer that is being computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ...model.attention import Mask
from ..session import LanguageModel


@dataclass
class KVSegment:
    """Keys and values of one pass, for each layer (R, K, S, D)."""

    layers: list[tuple[mx.array, mx.array]]
    lengths: list[int]
    """Tokens of each row; the positions after them are padding."""


@dataclass
class SharedKVCache:
    """The keys and values that each of `rows` texts continues, as a sequence of segments."""

    segments: list[tuple[KVSegment, list[int]]]
    """Each with its row for every text."""
    rows: int

    @property
    def offsets(self) -> list[int]:
        """Tokens cached of each text."""
        return [
            sum(segment.lengths[at[row]] for segment, at in self.segments)
            for row in range(self.rows)
        ]

    def select(self, rows: Sequence[int]) -> SharedKVCache:
        """Return a cache whose texts continue those of `rows`, which may repeat."""
        segments = [(segment, [at[row] for row in rows]) for segment, at in self.segments]
        return SharedKVCache(segments, len(rows))

    def mask(self, steps: int) -> Mask:
        """Return what `steps` new positions see, (B, 1, T, S + T)."""
        if not self.segments:
            return "causal" if steps > 1 else None
        parts = []
        for segment, at in self.segments:
            lengths = mx.array([segment.lengths[row] for row in at])[:, None, None, None]
            is_token = mx.arange(segment.layers[0][0].shape[2]) < lengths  # (B, 1, 1, S)
            parts.append(mx.broadcast_to(is_token, (self.rows, 1, steps, is_token.shape[-1])))
        causal = mx.arange(steps)[:, None] >= mx.arange(steps)
        parts.append(mx.broadcast_to(causal, (self.rows, 1, steps, steps)))
        return mx.concatenate(parts, axis=-1)


class SharedLayerCache:
    """One layer of a SharedKVCache during a pass, with the interface of mlx-lm's caches."""

    def __init__(
        self, cache: SharedKVCache, layer: int, offset: int | mx.array, mask: Mask
    ) -> None:
        self.cache, self.layer, self.offset, self.mask = cache, layer, offset, mask
        self.new: tuple[mx.array, mx.array] | None = None

    def make_mask(self, T: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        return self.mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.new = keys, values
        if not self.cache.segments:
            return keys, values
        return self._concatenated(0, keys), self._concatenated(1, values)

    def _concatenated(self, index: int, new: mx.array) -> mx.array:
        parts = []
        for segment, at in self.cache.segments:
            array = segment.layers[self.layer][index]
            if array.shape[0] == 1:
                parts.append(mx.broadcast_to(array, (len(at), *array.shape[1:])))
            else:
                parts.append(array[mx.array(at)])
        return mx.concatenate([*parts, new], axis=2)


def read_rows(
    model: LanguageModel, cache: SharedKVCache, rows: Sequence[Sequence[int]], length: int
) -> tuple[mx.array, SharedKVCache]:
    """Read `rows`, which continue the texts of `cache`, in one pass.

    Returns hidden states (B, T, hidden), padded to the longest row, and the cache with the rows.
    `length` is that of the longest whole text.
    """
    steps = max(map(len, rows))
    ids = mx.array([[*row, *[0] * (steps - len(row))] for row in rows])
    offsets, mask = cache.offsets, cache.mask(steps)
    offset = offsets[0] if len(set(offsets)) == 1 else mx.array(offsets)
    layers = [
        SharedLayerCache(cache, layer, offset, mask)
        for layer in range(model.config.num_hidden_layers)
    ]
    hidden = model.hidden(ids, layers, length)
    new = [layer.new for layer in layers if layer.new is not None]
    mx.eval(hidden, new)
    segment = KVSegment(new, [len(row) for row in rows])
    return hidden, SharedKVCache([*cache.segments, (segment, list(range(len(rows))))], len(rows))
