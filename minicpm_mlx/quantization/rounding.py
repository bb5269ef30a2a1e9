"""Rounding a block's matrices: to the nearest, by what they read (GPTQ), or rescaled (AWQ)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model.config_sections import Quantization
from ..model.modules import replace_module
from ..model.packing import PACKED_NAMES
from ..model.transformer import Block
from .bit_allocation import unit
from .gptq import (
    ROWS,
    Floats,
    Rounder,
    packed,
)
from .layerwise import LayerRun, at, products

SCALES = mx.float16
"""In which scales and biases are kept: of 16-bit formats the one with more digits."""


class Recorder(nn.Module):
    """A projection that sums x xT over the inputs it sees."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.hessian = mx.array(0.0)

    def __call__(self, x: mx.array) -> mx.array:
        self.hessian = self.hessian + products(x)
        return self.layer(x)


def round_nearest(block: nn.Module, plan: Mapping[str, Quantization]) -> None:
    """Replace the matrices of `block` that are in `plan` by packed ones, as MLX rounds."""
    for name, packing in plan.items():
        layer = at(block, name)
        replace_module(block, name, module(layer, to_nearest(layer.weight, packing), packing))


def to_nearest(weight: mx.array, packing: Quantization) -> tuple[mx.array, ...]:
    """Codes, scales and, if affine, biases of a matrix, as MLX rounds."""
    codes, *scales = mx.quantize(
        weight, group_size=packing.group_size, bits=packing.bits, mode=packing.mode
    )
    return codes, *(s.astype(SCALES) if packing.mode == "affine" else s for s in scales)


def round_gptq(
    block: Block, plan: Mapping[str, Quantization], run: LayerRun, xs: Iterable[mx.array]
) -> None:
    """The same, so that what each makes of the inputs `xs` of the block changes least."""
    recorded = {}
    for name, *_ in _reading_alike(plan):
        recorded[name] = Recorder(at(block, name))
        replace_module(block, name, recorded[name])
    for x in xs:
        mx.eval(run(block, x), [recorder.hessian for recorder in recorded.values()])
    for name, recorder in recorded.items():
        replace_module(block, name, recorder.layer)
    for members in _reading_alike(plan):
        layers, packing = [at(block, name) for name in members], plan[members[0]]
        weight = mx.concatenate([layer.weight for layer in layers])
        found = by_gptq(weight, np.array(recorded[members[0]].hessian), packing)
        rows = np.cumsum([len(layer.weight) for layer in layers])[:-1]
        for name, layer, *arrays in zip(
            members, layers, *(mx.split(array, rows.tolist()) for array in found), strict=True
        ):
            replace_module(block, name, module(layer, tuple(arrays), packing))


def by_gptq(weight: mx.array, hessian: Floats, packing: Quantization) -> tuple[mx.array, ...]:
    """Codes, scales and biases of a matrix (out, in), as MLX keeps them."""
    rounder, parts = Rounder(hessian), []
    for start in range(0, len(weight), ROWS):
        rows = np.array(weight[start : start + ROWS].astype(mx.float32))
        found = rounder(rows, packing.bits, packing.group_size, SCALES)
        scales = (mx.array(array).astype(SCALES) for array in (found.scales, found.biases))
        parts.append((packed(found, packing.bits), *scales))
        mx.eval(parts[-1])
    return tuple(mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True))


def module(layer: nn.Module, arrays: Sequence[mx.array], packing: Quantization) -> nn.Module:
    """The packed form of `layer`, of codes, scales and, if affine, biases."""
    how: Any = {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}
    made: Any = nn.QuantizedLinear(packing.group_size, packing.group_size, bias=False, **how)
    for name, array in zip(PACKED_NAMES, arrays, strict=False):
        made[name] = array
    if "bias" in layer:
        made.bias = layer.bias
    mx.eval(made.parameters())
    return made


def _reading_alike(plan: Mapping[str, Quantization]) -> list[list[str]]:
    """Matrices with the same input and packing, together: they are rounded as one."""

    def key(name: str) -> tuple[str, ...]:
        # of experts each its own
        return (name.rpartition(".")[0], unit(name), repr(plan[name]))

    return [list(members) for _, members in groupby(sorted(plan, key=key), key)]
