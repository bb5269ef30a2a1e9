"""The key-value cache of one stream, with the interface of mlx-lm's caches.

mlx-lm's own would do; importing it costs the better part of a second, which the first token of a
single stream should not wait for.
"""

from __future__ import annotations

import mlx.core as mx


class KVCache:
    """Keys and values of one layer, (B, K, T, D); room is added 256 positions at a time."""

    step = 256

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, K, T, D); return all there are."""
        start, end = self.offset, self.offset + keys.shape[2]
        if self.keys is None or self.values is None:
            self.keys, self.values = self._room(keys, end), self._room(values, end)
        elif end > self.keys.shape[2]:
            more = end - start
            self.keys = mx.concatenate([self.keys[..., :start, :], self._room(keys, more)], axis=2)
            self.values = mx.concatenate(
                [self.values[..., :start, :], self._room(values, more)], axis=2
            )
        self.keys[..., start:end, :] = keys
        self.values[..., start:end, :] = values
        self.offset = end
        return self.keys[..., :end, :], self.values[..., :end, :]

    def _room(self, like: mx.array, positions: int) -> mx.array:
        B, K, _, D = like.shape
        rounded = -(-positions // self.step) * self.step
        return mx.zeros((B, K, rounded, D), like.dtype)

    def make_mask(
        self, T: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The attention mask for the next T positions."""
        if window_size is not None:
            raise ValueError("KVCache has no sliding window; expected window_size=None")
        if return_array:
            rows = mx.arange(self.offset, self.offset + T)[:, None]
            return rows >= mx.arange(self.offset + T)
        return "causal" if T > 1 else None

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget the last n positions; the next update overwrites them."""
        n = min(n, self.offset)
        self.offset -= n
        return n

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate."""
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)
