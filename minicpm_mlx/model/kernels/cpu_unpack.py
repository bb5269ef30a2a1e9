"""Dequantization of 2-, 4- and 8-bit matrices on a CPU, several times faster than MLX's kernel."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

THREADS = 2
"""Threads that unpack; more wait for the memory."""


class UnpackJob(NamedTuple):
    """A dense block to compute: out = codes * scale + bias."""

    codes: npt.NDArray[np.uint8]
    """(groups, bytes)"""
    scale: npt.NDArray[np.float32]
    """(groups, 1)"""
    bias: npt.NDArray[np.float32]
    """(groups, 1)"""
    bits: int
    out: npt.NDArray[np.float32]
    """(groups, weights)"""

    def run(self) -> None:
        """Look up the floats of each byte, then scale while the block is in the cache."""
        codes, scale, bias, bits, out = self
        table = _byte_table(bits)
        block = max(1, (1 << 17) // out.shape[1])  # 512 KB of floats
        scratch = np.empty((block, codes.shape[1]), table.dtype)
        for start in range(0, len(codes), block):
            rows = slice(start, min(start + block, len(codes)))
            wide = scratch[: rows.stop - start]
            table.take(codes[rows], mode="clip", out=wide)
            floats = wide.view(np.float32)
            np.multiply(floats, scale[rows], out=floats)
            np.add(floats, bias[rows], out=out[rows])


def unpack(
    weight: mx.array, scales: mx.array, biases: mx.array, bits: int
) -> tuple[mx.array, list[UnpackJob]]:
    """Return the dense matrix in float32, filled once the jobs have run.

    The jobs write into MLX's own memory, which spares a copy.
    """
    codes = np.asarray(weight).view(np.uint8).reshape(scales.size, -1)
    scale = np.asarray(scales.astype(mx.float32)).reshape(-1, 1)
    bias = np.asarray(biases.astype(mx.float32)).reshape(-1, 1)
    dense = mx.zeros((scales.size, codes.shape[1] * 8 // bits))
    out = np.array(dense, copy=False)
    share = -(-scales.size // THREADS)
    blocks = [slice(start, start + share) for start in range(0, scales.size, share)]
    jobs = [UnpackJob(codes[rows], scale[rows], bias[rows], bits, out[rows]) for rows in blocks]
    return dense.reshape(*weight.shape[:-1], -1), jobs


WIDE = {8: np.uint32, 4: np.uint64, 2: np.complex128}
"""By bits, a number as wide as the floats of one byte of codes."""


@cache
def _byte_table(bits: int) -> npt.NDArray[np.number[Any]]:
    """For each byte its codes as float32, lowest bits first, viewed as one wide number."""
    byte = np.arange(256)[:, None]
    codes = (byte >> np.arange(0, 8, bits)) & (2**bits - 1)
    return codes.astype(np.float32).view(WIDE[bits]).reshape(-1)
