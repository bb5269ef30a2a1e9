"""Rounds the matrices of a block, to nearest or with GPTQ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model.config_sections import Quantization
from ..model.modules import at, replace_module
from ..model.packing import PACKED_NAMES
from ..model.transformer import Block
from .bit_allocation import unit
from .gptq import ROWS, Floats, Rounder, packed
from .layerwise import LayerRun, products

SCALES = mx.float16
"""Format of scales and biases: of the 16-bit formats the more precise one."""


class HessianRecorder(nn.Module):
    """A projection that sums x xT over the inputs it sees."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.hessian = mx.array(0.0)

    def __call__(self, x: mx.array) -> mx.array:
        self.hessian = self.hessian + products(x)
        return self.layer(x)


def round_nearest(block: nn.Module, plan: Mapping[str, Quantization]) -> None:
    """Replace the matrices of `block` that are in `plan` by packed ones, rounded by MLX."""
    for name, packing in plan.items():
        layer = at(block, name)
        replace_module(block, name, module(layer, to_nearest(layer.weight, packing), packing))


def to_nearest(weight: mx.array, packing: Quantization) -> tuple[mx.array, ...]:
    """Codes, scales and, if affine, biases of a matrix, rounded by MLX."""
    codes, *scales = mx.quantize(
        weight, group_size=packing.group_size, bits=packing.bits, mode=packing.mode
    )
    return codes, *(s.astype(SCALES) if packing.mode == "affine" else s for s in scales)


def round_gptq(
    block: Block, plan: Mapping[str, Quantization], run: LayerRun, xs: Iterable[mx.array]
) -> None:
    """As `round_nearest`, with GPTQ for the inputs `xs` of the block."""
    recorders = {}
    for name, *_ in _same_input(plan):
        recorders[name] = HessianRecorder(at(block, name))
        replace_module(block, name, recorders[name])
    for x in xs:
        mx.eval(run(block, x), [recorder.hessian for recorder in recorders.values()])
    for name, recorder in recorders.items():
        replace_module(block, name, recorder.layer)
    for members in _same_input(plan):
        layers, packing = [at(block, name) for name in members], plan[members[0]]
        weight = mx.concatenate([layer.weight for layer in layers])
        packed_arrays = by_gptq(weight, np.array(recorders[members[0]].hessian), packing)
        rows = np.cumsum([len(layer.weight) for layer in layers])[:-1]
        parts = [mx.split(array, rows.tolist()) for array in packed_arrays]
        for name, layer, *arrays in zip(members, layers, *parts, strict=True):
            replace_module(block, name, module(layer, tuple(arrays), packing))


def by_gptq(weight: mx.array, hessian: Floats, packing: Quantization) -> tuple[mx.array, ...]:
    """Codes, scales and biases of a matrix (out, in), in MLX's packing."""
    rounder, parts = Rounder(hessian), []
    for start in range(0, len(weight), ROWS):
        rows = np.array(weight[start : start + ROWS].astype(mx.float32))
        matrix = rounder(rows, packing.bits, packing.group_size, SCALES)
        scales = (mx.array(array).astype(SCALES) for array in (matrix.scales, matrix.biases))
        parts.append((packed(matrix, packing.bits), *scales))
        mx.eval(parts[-1])
    return tuple(mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True))


def module(layer: nn.Module, arrays: Sequence[mx.array], packing: Quantization) -> nn.Module:
    """The packed form of `layer`, from codes, scales and, if affine, biases."""
    options: Any = {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}
    packed_layer: Any = nn.QuantizedLinear(
        packing.group_size, packing.group_size, bias=False, **options
    )
    for name, array in zip(PACKED_NAMES, arrays, strict=False):
        packed_layer[name] = array
    if "bias" in layer:
        packed_layer.bias = layer.bias
    mx.eval(packed_layer.parameters())
    return packed_layer


def _same_input(plan: Mapping[str, Quantization]) -> list[list[str]]:
    """Groups of matrices with the same input and packing, which are rounded as one."""

    def key(name: str) -> tuple[str, ...]:
        # `unit` joins all experts of a layer, but each has its own input: hence the parent.
        return (name.rpartition(".")[0], unit(name), repr(plan[name]))

    return [list(members) for _, members in groupby(sorted(plan, key=key), key)]
