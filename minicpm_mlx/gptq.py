"""GPTQ: rounding a matrix so that what it computes changes least, not its weights.

Columns are rounded one after the other, and the error of each is made good, as far as the inputs
seen while calibrating allow, by the columns still to come (Frantar et al., arXiv 2210.17323). The
grid of each group is the best of several, by the squared error weighted with the inputs' size.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

DAMPING = 0.01
"""Share of the mean diagonal that is added to it, so that it can be inverted."""

SHRINKS = tuple(1 - 0.04 * step for step in range(1, 9))
"""Grids that clip the outermost weights, as shares of the group's range."""


@dataclass(frozen=True)
class Packed:
    """A matrix in MLX's affine form, before packing: weight = code * scale + bias."""

    codes: npt.NDArray[np.uint8]
    """(out, in)"""
    scales: Floats
    """(out, in / group)"""
    biases: Floats
    """(out, in / group)"""


def gptq(weight: Floats, hessian: Floats, bits: int, group: int, dtype: mx.Dtype) -> Packed:
    """Round `weight` (out, in), whose inputs x had `hessian`, the sum of x xT (in, in).

    Scales and biases are such as `dtype` can hold.
    """
    weight = weight.copy()
    out, width = weight.shape
    upper = _upper(hessian)
    importance = np.diag(hessian).astype(np.float32)
    codes = np.empty((out, width), np.uint8)
    scales = np.empty((out, width // group), np.float32)
    biases = np.empty_like(scales)
    most = 2**bits - 1
    for start in range(0, width, group):
        end = start + group
        block = weight[:, start:end]
        scale, bias = grid(block, importance[start:end], most, dtype)
        errors = np.empty_like(block)
        for at in range(group):
            column = block[:, at]
            code = np.clip(np.rint((column - bias) / scale), 0, most)
            codes[:, start + at] = code
            row = upper[start + at, start:end]
            errors[:, at] = (column - (code * scale + bias)) / row[at]
            block[:, at + 1 :] -= errors[:, at : at + 1] * row[at + 1 :]
        weight[:, end:] -= errors @ upper[start:end, end:]
        scales[:, start // group], biases[:, start // group] = scale, bias
    return Packed(codes, scales, biases)


def _upper(hessian: Floats) -> Floats:
    """The upper Cholesky factor of the inverse of the damped Hessian."""
    damped = hessian.astype(np.float64)
    diagonal = np.diag(damped).copy()
    diagonal[diagonal == 0] = 1.0  # an input that was never seen
    diagonal += DAMPING * diagonal.mean()
    np.fill_diagonal(damped, diagonal)
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)


def grid(block: Floats, importance: Floats, most: int, dtype: mx.Dtype) -> tuple[Floats, Floats]:
    """Scale and bias (out,) for the rows of `block` (out, group), of codes up to `most`.

    Tried are the range of the weights in `most` steps, in fewer (which finds again the grid of
    weights that were rounded before), and parts of it.
    """
    low, high = block.min(axis=1), block.max(axis=1)
    steps = [(low, (high - low) / count) for count in range(most, most // 2, -1)]
    clipped = [(low * share, (high - low) * share / most) for share in SHRINKS]
    best = np.full(len(block), np.inf, np.float32)
    scale, bias = np.ones_like(low), np.zeros_like(low)
    for offset, step in steps + clipped:
        step = _rounded(np.where(step > 0, step, 1.0), dtype)
        offset = _rounded(offset, dtype)
        code = np.clip(np.rint((block - offset[:, None]) / step[:, None]), 0, most)
        error = ((code * step[:, None] + offset[:, None] - block) ** 2) @ importance
        better = error < best
        best = np.where(better, error, best)
        scale, bias = np.where(better, step, scale), np.where(better, offset, bias)
    return scale, bias


def _rounded(values: Floats, dtype: mx.Dtype) -> Floats:
    return np.array(mx.array(values).astype(dtype).astype(mx.float32))


def packed(found: Packed, bits: int) -> mx.array:
    """MLX's packing: codes of a row one after the other, low bits first, in 32-bit words."""
    out, width = found.codes.shape
    shifts = np.arange(bits, dtype=np.uint8)
    stream = ((found.codes[..., None] >> shifts) & 1).reshape(out, width * bits)
    words = np.packbits(stream, axis=1, bitorder="little").view(np.uint32)
    return mx.array(words)
