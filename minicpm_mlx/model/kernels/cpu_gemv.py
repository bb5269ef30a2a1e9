"""One-row products of dense matrices, for decoding on a CPU with OpenBLAS.

OpenBLAS copies the whole matrix to multiply a single row, unless the product is small. So a large
matrix is multiplied in blocks, half of them on a second thread.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ... import device
from ..modules import replace_module

COPIED = 1_000_000
"""Weights of a matrix from which OpenBLAS 0.3.21 copies it."""

BLOCK = 400_000
"""Weights of a block at most; smaller ones gain nothing."""


def split_matrices(model: nn.Module) -> None:
    """With OpenBLAS, make the large dense matrices of `model` multiply single rows in blocks."""
    if not device.on_cpu() or not (device.blas or "").startswith("libopenblas"):
        return
    second = mx.new_thread_local_stream(mx.cpu)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and _is_large(module.weight):
            replace_module(model, path, SplitLinear(module, second))
        elif type(module) is nn.Embedding and _is_large(module.weight):
            replace_module(model, path, SplitEmbedding(module, second))


def _is_large(weight: mx.array) -> bool:
    matrix = weight.ndim == 2 and len(weight) > 1  # not a stack of experts
    return matrix and weight.dtype == mx.float32 and weight.size >= COPIED


class SplitLinear(nn.Module):
    def __init__(self, linear: nn.Linear, second: mx.ThreadLocalStream):
        super().__init__()
        self.linear = linear
        self._blocks = RowBlocks(linear.weight, second)

    def __call__(self, x: mx.array) -> mx.array:
        if x.size != x.shape[-1]:
            return self.linear(x)
        out = self._blocks.times(x)
        return out + self.linear.bias if "bias" in self.linear else out


class SplitEmbedding(nn.Module):
    def __init__(self, embedding: nn.Embedding, second: mx.ThreadLocalStream):
        super().__init__()
        self.embedding = embedding
        self._blocks = RowBlocks(embedding.weight, second)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.embedding(ids)

    def as_linear(self, x: mx.array) -> mx.array:
        return self.embedding.as_linear(x) if x.size != x.shape[-1] else self._blocks.times(x)


class RowBlocks:
    """A matrix (N, K) as views: blocks for one thread, as many for another, and remaining rows."""

    def __init__(self, weight: mx.array, second: mx.ThreadLocalStream):
        N, K = weight.shape
        pairs = min(-(-weight.size // (2 * BLOCK)), N // 2)
        rows = N // (2 * pairs)
        blocks = weight[: 2 * pairs * rows].reshape(2 * pairs, rows, K).swapaxes(1, 2)
        self.halves = blocks[:pairs], blocks[pairs:]
        self.rest = weight[2 * pairs * rows :].T
        self.second = second
        mx.eval(self.halves, self.rest)

    def times(self, x: mx.array) -> mx.array:
        """x (..., K), a single row, times the matrix: (..., N)."""
        row = x.reshape(1, 1, -1)
        parts = [
            mx.matmul(row, self.halves[0]).flatten(),
            mx.matmul(row, self.halves[1], stream=self.second).flatten(),
        ]
        if self.rest.size:
            parts.append(mx.matmul(row, self.rest).flatten())
        return mx.concatenate(parts).reshape(*x.shape[:-1], -1)
