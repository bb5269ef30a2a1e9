"""Packs a slightly changed matrix again in the same bits.

A small change moves weights between the levels of their group's grid. Each group either stays on
its old grid, on which unchanged weights are exact, or moves to a new one that fits the changed
weights. The nearer one is taken, so the error is never larger than the change itself.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..model.config_sections import Quantization
from ..model.packing import PackedMatrix, unpack
from .gptq import AffineCodes, Floats, grid, packed

Codes = npt.NDArray[np.uint8]

GROUPS = 1024
"""Groups processed at a time; they fit the processor's cache."""

ENOUGH = 1 / 24
"""Mean squared error, in squared steps of a grid as wide as the group, below which the old grid is
kept without a search. A new grid has 1/12 on average, as uniform rounding has."""


def repack(wanted: mx.array, old: PackedMatrix, packing: Quantization) -> dict[str, mx.array]:
    """`wanted` (out, in), float32, in the packing of `old`, from which it was made."""
    if packing.mode == "affine":
        return _affine(wanted, old, packing)
    weight, scales, *_ = mx.quantize(
        wanted, group_size=packing.group_size, bits=packing.bits, mode=packing.mode
    )
    new = {"weight": weight, "scales": scales}
    groups = (*scales.shape, -1)  # a group fills whole words, so words can be chosen by group

    def error(parts: PackedMatrix) -> mx.array:
        return ((unpack(parts, packing) - wanted) ** 2).reshape(groups).sum(axis=-1)

    kept = error(old) <= error(new)
    weight = mx.where(kept[..., None], old["weight"].reshape(groups), weight.reshape(groups))
    return {
        "weight": weight.reshape(old["weight"].shape),
        "scales": mx.where(kept, old["scales"], scales),
    }


def _affine(wanted: mx.array, old: PackedMatrix, packing: Quantization) -> dict[str, mx.array]:
    stored, shape = old["scales"].dtype, old["scales"].shape
    block = np.array(wanted).reshape(-1, packing.group_size)  # (groups, weights)
    scale, bias = (np.array(old[p].astype(mx.float32)).reshape(-1) for p in ("scales", "biases"))
    codes = np.empty(block.shape, np.uint8)
    for start in range(0, len(block), GROUPS):
        some = slice(start, start + GROUPS)
        codes[some] = _regrid(block[some], scale[some], bias[some], packing.bits, stored)
    matrix = AffineCodes(codes.reshape(wanted.shape), scale.reshape(shape), bias.reshape(shape))
    return {
        "weight": packed(matrix, packing.bits),
        "scales": mx.array(matrix.scales).astype(stored),
        "biases": mx.array(matrix.biases).astype(stored),
    }


def _regrid(block: Floats, scale: Floats, bias: Floats, bits: int, stored: mx.Dtype) -> Codes:
    """The codes of `block` (groups, weights); `scale` and `bias` (groups,) are changed in place."""
    most, size = 2**bits - 1, block.shape[1]
    codes, error = _rounded(block, scale, bias, most)
    step = (block.max(axis=1) - block.min(axis=1)) / most
    [worse] = np.nonzero(error > ENOUGH * size * step**2)
    if worse.size:
        new = grid(block[worse], np.ones(size, np.float32), most, stored)
        new_codes, new_error = _rounded(block[worse], *new, most)
        better = new_error < error[worse]
        moved = worse[better]
        codes[moved], scale[moved], bias[moved] = (a[better] for a in (new_codes, *new))
    return codes


def _rounded(block: Floats, scale: Floats, bias: Floats, most: int) -> tuple[Codes, Floats]:
    """The codes nearest to `block` (groups, weights) on a grid, and each group's squared error."""
    step = np.where(scale == 0, np.float32(1), scale)[:, None]  # a group of zeros may have none
    code = np.clip(np.rint((block - bias[:, None]) / step), 0, most)
    error = ((code * scale[:, None] + bias[:, None] - block) ** 2).sum(axis=1)
    return code.astype(np.uint8), error
