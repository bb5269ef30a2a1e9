"""Packs ternary weights into 2 bits without changing one.

Every group of a ternary matrix holds -s, 0 and s alone. In MLX's affine form it has the scale s,
the bias -s and the codes 0, 1 and 2. Scales keep the weights' own float format, in which 2 s - s is
exact, so unpacking gives the same numbers; only -0.0 becomes 0.0. Numbers are compared as bits,
since a GPU may take subnormal ones for 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import InvalidArgumentError, WeightsError
from ..model.config_sections import PACKINGS, Quantization
from ..model.packing import packing_options
from ..weights.checkpoint import Checkpoint
from ..weights.lazy_ops import dense, packed_parts
from ..weights.lazy_tensor import LazyTensor
from .bit_allocation import nothing_to_pack, quantization_section, sizes, unit

BITS = 2
GROUPS = PACKINGS["affine"][1]
"""Group sizes, the smallest first."""
PER_WORD = 32 // BITS
"""Codes in 32 bits."""

FORMATS = {
    mx.float32: (mx.uint32, 0x7F00_0000),
    mx.bfloat16: (mx.uint16, 0x7F00),
    mx.float16: (mx.uint16, 0x7800),
}
"""By float format, the integer of its width and the bits of the least s whose 2 s is infinite."""


class TernaryCheck(NamedTuple):
    """How a matrix divides into groups of -s, 0 and s."""

    group_size: int | None
    """The largest for which all groups fit; None if there is none."""
    groups: int
    """Number of groups of the smallest size that MLX packs."""
    misfits: int
    """Of these, the groups that hold anything else."""


def pack_ternary(
    checkpoint: Checkpoint, progress: Callable[[str], object] = lambda _: None
) -> Checkpoint:
    """The checkpoint with every ternary matrix in 2 bits, packed when it is loaded.

    An embedding or a head that is not ternary stays as it is, and so do matrices whose rows do not
    divide into groups. InvalidArgumentError if another matrix is not ternary.
    """
    source = dense(checkpoint)
    shapes = sizes(source)
    checks: dict[str, TernaryCheck] = {}
    for number, (path, (_, width)) in enumerate(shapes.items(), 1):
        if width % GROUPS[0] == 0:
            checks[path] = check_ternary(source.tensors[f"{path}.weight"].load())
        progress(f"matrix {number} of {len(shapes)}")
    if not checks:
        raise nothing_to_pack(shapes)
    inside = {path: check for path, check in checks.items() if "layers." in path}
    if any(check.misfits for check in inside.values()):
        raise _not_ternary(inside)
    sizes_found = {path: c.group_size for path, c in checks.items() if c.group_size is not None}
    if not sizes_found:
        raise _not_ternary(checks)
    plan = {
        # Matrices that fused.py joins must be packed alike.
        path: Quantization(
            bits=BITS,
            group_size=min(
                size for other, size in sizes_found.items() if unit(other) == unit(path)
            ),
        )
        for path in sizes_found
    }
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in source.tensors.items():
        module, _, part = name.rpartition(".")
        if module in plan and part == "weight":
            tensors |= _packed(module, tensor, plan[module].group_size)
        else:
            tensors[name] = tensor
    return Checkpoint(
        raw=source.raw | {"quantization": quantization_section(plan)}, tensors=tensors
    )


def check_ternary(weight: mx.array) -> TernaryCheck:
    """Find the largest groups that fit in `weight` (out, in), a float matrix."""
    misfits = 0
    for size in reversed(GROUPS):
        if weight.shape[1] % size == 0:
            magnitude = _magnitude(weight, size)
            peak = magnitude.max(axis=-1, keepdims=True)
            fits = ((magnitude == 0) | (magnitude == peak)).all(axis=-1)
            fits &= peak[..., 0] < FORMATS[weight.dtype][1]  # neither infinite nor NaN
            misfits = int(np.count_nonzero(~np.array(fits)))
            if not misfits:
                return TernaryCheck(size, weight.size // GROUPS[0], 0)
    return TernaryCheck(None, weight.size // GROUPS[0], misfits)


def check_equal(checkpoint: Checkpoint, packed: Checkpoint) -> dict[str, int]:
    """Compare every packed matrix, unpacked in its own format, with the checkpoint's.

    Returns the numbers of matrices and weights; WeightsError if one differs.
    """
    source, counts = dense(checkpoint), {"matrices": 0, "weights": 0}
    for path, packing in packed.packings.items():
        codes, scales, biases = (t.load() for t in packed_parts(packed.tensors, path).values())
        weight = source.tensors[f"{path}.weight"].load()
        unpacked = mx.dequantize(codes, scales, biases, **packing_options(packing))
        if unpacked.dtype != weight.dtype or not mx.array_equal(unpacked, weight).item():
            raise WeightsError(f"{path}: the packed weights differ from the source's; try again")
        counts["matrices"] += 1
        counts["weights"] += weight.size
    return counts


def _not_ternary(checks: Mapping[str, TernaryCheck]) -> InvalidArgumentError:
    groups = sum(check.groups for check in checks.values())
    misfits = sum(check.misfits for check in checks.values())
    path, worst = max(checks.items(), key=lambda item: item[1].misfits / item[1].groups)
    return InvalidArgumentError(
        f"exact is for ternary weights: of {groups} groups of {GROUPS[0]} weights {misfits} "
        f"({100 * misfits / groups:.3g} %) are not all -s, 0 or s; worst is {path} "
        f"({100 * worst.misfits / worst.groups:.3g} %). Choose another method, or use the model as "
        "it is",
        field="method",
    )


def _packed(module: str, tensor: LazyTensor, size: int) -> dict[str, LazyTensor]:
    rows, width = tensor.shape
    grid = (rows, width // size)
    return {
        f"{module}.weight": LazyTensor(
            (rows, width // PER_WORD), mx.uint32, partial(_codes, tensor)
        ),
        f"{module}.scales": LazyTensor(grid, tensor.dtype, partial(_scales, tensor, size)),
        f"{module}.biases": LazyTensor(grid, tensor.dtype, lambda: -_scales(tensor, size)),
    }


def _codes(tensor: LazyTensor) -> mx.array:
    weight = tensor.load()
    raw = weight.view(FORMATS[weight.dtype][0])
    negative = raw >> (8 * weight.dtype.size - 1)
    zero = (_magnitude(weight, PER_WORD) == 0).reshape(raw.shape)
    codes = mx.where(zero, 1, 2 - 2 * negative).astype(mx.uint32)
    shifts = mx.arange(PER_WORD, dtype=mx.uint32) * BITS
    return (codes.reshape(len(codes), -1, PER_WORD) << shifts).sum(axis=-1)


def _scales(tensor: LazyTensor, size: int) -> mx.array:
    return _magnitude(tensor.load(), size).max(axis=-1).view(tensor.dtype)


def _magnitude(weight: mx.array, size: int) -> mx.array:
    """The bits of absolute values, (out, groups, size); as integers they are in the same order."""
    raw = weight.view(FORMATS[weight.dtype][0])
    return (raw & ((1 << (8 * weight.dtype.size - 1)) - 1)).reshape(len(weight), -1, size)
