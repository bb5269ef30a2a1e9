"""The key-value cache of one stream, with the interface of mlx-lm's caches.

mlx-lm's own would do, but importing it delays the first token by the better part of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..memory import kv_group_size

KVArrays = tuple[mx.array, ...]
"""Keys or values: one array (B, K, T, D), or codes, scales and biases of as many positions."""


class KVCache:
    """Keys and values of one layer, (B, K, T, D); D of keys and of values may differ.

    The buffers grow by a quarter, so that a long text is copied only a few times in all. With
    `bits` (8 or 4) keys and values are quantized.
    """

    step = 256
    """Buffers hold a multiple of this many positions."""

    def __init__(self, bits: int | None = None) -> None:
        self.bits = bits
        self.keys: KVArrays = ()
        self.values: KVArrays = ()
        self.offset = 0

    def append(self, keys: mx.array, values: mx.array) -> tuple[KVArrays, KVArrays]:
        """Append keys and values (B, K, T, D); return the arrays of all positions."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = self._write(self.keys, self._packed(keys), start)
        self.values = self._write(self.values, self._packed(values), start)
        return self.used(self.keys), self.used(self.values)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, K, T, D); return all, dense (B, K, S, D)."""
        k, v = self.append(keys, values)
        if self.bits is None and k[0].dtype == keys.dtype:
            return k[0], v[0]
        return self.dense(k).astype(keys.dtype), self.dense(v).astype(values.dtype)

    def dense(self, arrays: KVArrays) -> mx.array:
        """Return keys or values (B, K, T, D), unpacked."""
        if self.bits is None:
            return arrays[0]
        codes, scales, biases = arrays
        return mx.dequantize(codes, scales, biases, **self.packing(arrays))

    def packing(self, arrays: KVArrays) -> dict[str, Any]:
        """MLX's arguments for packed keys or values, which may differ in width."""
        bits = self.bits or 0
        width = arrays[0].shape[-1] * 32 // bits
        return {"group_size": width // arrays[1].shape[-1], "bits": bits}

    def used(self, buffers: KVArrays) -> KVArrays:
        """Return the positions written so far."""
        end = self.offset
        return tuple([buffer[:, :, :end] for buffer in buffers])

    def _packed(self, x: mx.array) -> KVArrays:
        if self.bits is None:
            return (x,)
        return tuple(mx.quantize(x, group_size=kv_group_size(x.shape[-1]), bits=self.bits))

    def _write(self, buffers: KVArrays, new: KVArrays, start: int) -> KVArrays:
        """Write `new` at position `start`; return the buffers, larger ones where they were full."""
        end = start + new[0].shape[2]
        if not buffers:
            buffers = tuple(self._allocate(array, end) for array in new)
        elif end > (capacity := buffers[0].shape[2]):
            more = max(end, capacity + capacity // 4) - start
            buffers = tuple(
                mx.concatenate([buffer[..., :start, :], self._allocate(buffer, more)], axis=2)
                for buffer in buffers
            )
        for buffer, array in zip(buffers, new, strict=True):
            buffer[:, :, start:end] = array  # an ellipsis would take the host twice as long
        return buffers

    def _allocate(self, like: mx.array, positions: int) -> mx.array:
        B, K, _, D = like.shape
        rounded = -(-positions // self.step) * self.step
        return mx.zeros((B, K, rounded, D), like.dtype)

    def make_mask(
        self, T: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """Return the attention mask for the next T positions."""
        if window_size is not None:
            raise ValueError("KVCache has no sliding window; expected window_size=None")
        if return_array:
            rows = mx.arange(self.offset, self.offset + T)[:, None]
            return rows >= mx.arange(self.offset + T)
        return "causal" if T > 1 else None

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Drop the last n positions; return how many were dropped."""
        n = min(n, self.offset)
        self.offset -= n
        return n

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate."""
        return [*self.keys, *self.values]

    def restore(self, arrays: Sequence[mx.array]) -> None:
        """Load `[*used(keys), *used(values)]` of a cache with the same bits."""
        half = len(arrays) // 2
        self.keys, self.values = tuple(arrays[:half]), tuple(arrays[half:])
        self.offset = arrays[0].shape[2]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.state)
