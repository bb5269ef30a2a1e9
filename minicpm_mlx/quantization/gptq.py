"""GPTQ: rounds a matrix so that its output, rather than its weights, changes least.

Columns are rounded in order, and the error of each is compensated by the columns still to come, as
the calibration inputs allow (Frantar et al., arXiv 2210.17323). Each group's grid is the best of
several by squared error, weighted with the mean square of the inputs.

Inside, matrices are transposed, (in, out), so that a column's weights are adjacent in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

DAMPING = 0.01
"""Share of the mean diagonal added to the diagonal, so that the Hessian can be inverted."""

FEWER = 8
"""Number of grids to try with fewer steps than there are codes."""

ROWS = 4096
"""Rows rounded at a time: enough for fast products, few enough for the processor's cache."""

SHRINKS = tuple(1 - 0.04 * step for step in range(1, 9))
"""Grids to try that clip the outermost weights, as shares of the group's range."""


@dataclass(frozen=True)
class AffineCodes:
    """A matrix in MLX's affine form, before packing: weight = code * scale + bias."""

    codes: npt.NDArray[np.uint8]
    """(out, in)"""
    scales: Floats
    """(out, in / group)"""
    biases: Floats
    """(out, in / group)"""


class Rounder:
    """Rounds rows of a matrix whose inputs x have the `hessian`, the sum of x xT (in, in).

    Rows do not affect each other, so a large matrix can be rounded in parts that fit the cache.
    """

    def __init__(self, hessian: Floats):
        self.upper, self.importance = _upper(hessian), np.diag(hessian).astype(np.float32)

    def __call__(self, rows: Floats, bits: int, group: int, dtype: mx.Dtype) -> AffineCodes:
        """`rows` (n, in) in `bits`, with scales and biases that `dtype` represents exactly."""
        arrays = _round(rows.T.copy(), self.upper, self.importance, bits, group, dtype)
        return AffineCodes(*(array.T for array in arrays))


def _round(
    rest: Floats, upper: Floats, importance: Floats, bits: int, group: int, dtype: mx.Dtype
) -> tuple[npt.NDArray[np.uint8], Floats, Floats]:
    """Codes, scales and biases, transposed, of `rest` (in, out), which is overwritten."""
    width, out = rest.shape
    codes = np.empty((width, out), np.uint8)
    scales = np.empty((width // group, out), np.float32)
    biases = np.empty_like(scales)
    most = 2**bits - 1
    for start in range(0, width, group):
        end = start + group
        block = rest[start:end]
        scale, bias = _grid(block, importance[start:end], most, dtype)
        errors = np.empty_like(block)
        for at in range(group):
            code = np.clip(np.rint((block[at] - bias) / scale), 0, most)
            codes[start + at] = code
            row = upper[start + at, start:end]
            errors[at] = (block[at] - (code * scale + bias)) / row[at]
            block[at + 1 :] -= row[at + 1 :, None] * errors[at]
        rest[end:] -= upper[start:end, end:].T @ errors
        scales[start // group], biases[start // group] = scale, bias
    return codes, scales, biases


def nearest(weight: Floats, importance: Floats, bits: int, group: int, dtype: mx.Dtype) -> Floats:
    """`weight` (out, in) rounded to nearest, without compensation, on the same grids as GPTQ.

    `importance` (in,) is the mean square of the inputs.
    """
    groups = np.ascontiguousarray(weight.T).reshape(-1, group, len(weight))
    most = 2**bits - 1
    scale, bias = _grid(groups, importance.reshape(-1, group), most, dtype)
    scale, bias = scale[:, None], bias[:, None]
    rounded = np.clip(np.rint((groups - bias) / scale), 0, most) * scale + bias
    return rounded.reshape(-1, len(weight)).T


def _upper(hessian: Floats) -> Floats:
    """Upper triangular U with UT U = H^-1, for the damped Hessian H.

    Cholesky of H with both axes reversed gives L; the inverse of L, reversed again, is U. That
    saves inverting H first, as the paper does.
    """
    damped = hessian.astype(np.float32)
    diagonal = np.diag(damped).copy()
    diagonal[diagonal == 0] = 1.0  # an input that was always 0
    diagonal += DAMPING * diagonal.mean()
    np.fill_diagonal(damped, diagonal)
    lower = mx.linalg.cholesky(mx.array(damped[::-1, ::-1].copy()), stream=mx.cpu)
    return np.array(mx.linalg.tri_inv(lower, stream=mx.cpu))[::-1, ::-1].copy()


def grid(block: Floats, importance: Floats, most: int, dtype: mx.Dtype) -> tuple[Floats, Floats]:
    """Scale and bias (out,) for the rows of `block` (out, group), for codes from 0 to `most`.

    Tries the range of the weights in `most` steps, in fewer steps (which recovers the grid of
    weights that were rounded before), and shares of the range.
    """
    return _grid(np.ascontiguousarray(block.T), importance, most, dtype)


def _grid(block: Floats, importance: Floats, most: int, dtype: mx.Dtype) -> tuple[Floats, Floats]:
    """`grid` for the columns of `block` (..., group, out), with `importance` (..., group)."""
    best = np.full(block.shape[:-2] + block.shape[-1:], np.inf, np.float32)
    scale, bias = np.ones_like(best), np.zeros_like(best)
    error = np.empty_like(block)
    for offset, step in _candidates(block, most, dtype):
        np.subtract(block, offset[..., None, :], out=error)
        np.divide(error, step[..., None, :], out=error)
        error -= np.clip(np.rint(error), 0, most)  # from the nearest code, in steps
        np.multiply(error, error, out=error)
        cost = (importance[..., None, :] @ error)[..., 0, :] * step * step
        better = cost < best
        best = np.where(better, cost, best)
        scale, bias = np.where(better, step, scale), np.where(better, offset, bias)
    return scale, bias


def _candidates(block: Floats, most: int, dtype: mx.Dtype) -> Iterator[tuple[Floats, Floats]]:
    """Bias and scale of each grid to try."""
    low, high = block.min(axis=-2), block.max(axis=-2)
    counts = range(most, max(most - FEWER, most // 2), -1)
    steps = [(low, (high - low) / count) for count in counts]
    clipped = [(low * share, (high - low) * share / most) for share in SHRINKS]
    for offset, step in steps + clipped:
        step = _rounded(step, dtype)
        # Weights all alike, or a step that underflows in `dtype`: any step will do.
        yield _rounded(offset, dtype), np.where(step > 0, step, np.float32(1.0))


def _rounded(values: Floats, dtype: mx.Dtype) -> Floats:
    if dtype == mx.float16:  # faster in NumPy, which has no bfloat16
        return values.astype(np.float16).astype(np.float32)
    return np.array(mx.array(values).astype(dtype).astype(mx.float32))


def packed(matrix: AffineCodes, bits: int) -> mx.array:
    """Codes in MLX's packing: a row's codes in a stream of 32-bit words, lowest bits first."""
    out, width = matrix.codes.shape
    shifts = np.arange(bits, dtype=np.uint8)
    stream = ((matrix.codes[..., None] >> shifts) & 1).reshape(out, width * bits)
    words = np.packbits(stream, axis=1, bitorder="little").view(np.uint32)
    return mx.array(words)
