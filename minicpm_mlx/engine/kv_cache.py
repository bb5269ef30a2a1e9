"""The key-value cache of one stream, with the interface of mlx-lm's caches.

mlx-lm's own would do; importing it costs the better part of a second, which the first token of a
single stream should not wait for.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ..memory import group_of

Parts = tuple[mx.array, ...]
"""Keys or values: one array (B, K, T, D), or codes, scales and biases of as many positions."""


class KVCache:
    """Keys and values of one layer, (B, K, T, D).

    Room is added a quarter at a time, so that a text of any length is copied a few times in all.
    With `bits` (8 or 4) they are kept in that many.
    """

    step = 256
    """Positions that room is a multiple of."""

    def __init__(self, bits: int | None = None) -> None:
        self.bits = bits
        self.group_size = 64
        self.keys: Parts = ()
        self.values: Parts = ()
        self.offset = 0

    def append(self, keys: mx.array, values: mx.array) -> tuple[Parts, Parts]:
        """Append keys and values (B, K, T, D); return the parts of all there are."""
        self.group_size = group_of(keys.shape[-1])
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = self._written(self.keys, self._packed(keys), start)
        self.values = self._written(self.values, self._packed(values), start)
        return self.used(self.keys), self.used(self.values)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, K, T, D); return all there are, dense."""
        k, v = self.append(keys, values)
        return self.dense(k).astype(keys.dtype), self.dense(v).astype(values.dtype)

    def dense(self, parts: Parts) -> mx.array:
        """Keys or values (B, K, T, D) from their parts."""
        if self.bits is None:
            return parts[0]
        codes, scales, biases = parts
        return mx.dequantize(codes, scales, biases, group_size=self.group_size, bits=self.bits)

    def used(self, parts: Parts) -> Parts:
        """The positions written so far."""
        return tuple(part[..., : self.offset, :] for part in parts)

    def _packed(self, x: mx.array) -> Parts:
        if self.bits is None:
            return (x,)
        return tuple(mx.quantize(x, group_size=self.group_size, bits=self.bits))

    def _written(self, room: Parts, new: Parts, start: int) -> Parts:
        """`new` put at position `start` of `room`, which is enlarged where it is too small."""
        end = start + new[0].shape[2]
        if not room:
            room = tuple(self._room(part, end) for part in new)
        elif end > (before := room[0].shape[2]):
            more = max(end, before + before // 4) - start
            room = tuple(
                mx.concatenate([old[..., :start, :], self._room(old, more)], axis=2) for old in room
            )
        for old, part in zip(room, new, strict=True):
            old[..., start:end, :] = part
        return room

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
        return [*self.keys, *self.values]

    def restore(self, arrays: Sequence[mx.array]) -> None:
        """Take over what `[*used(keys), *used(values)]` of a cache of as many bits was."""
        half = len(arrays) // 2
        self.keys, self.values = tuple(arrays[:half]), tuple(arrays[half:])
        self.offset = arrays[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)
