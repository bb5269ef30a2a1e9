"""Packing matrices into few bits, and unpacking them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from ..device import on_cpu
from ..errors import InvalidArgumentError
from .config_sections import Quantization

PARTS = ("weight", "scales", "biases")
"""A packed matrix: codes, and what turns a group's into weights; float modes have no biases."""

THREADS = 2
"""That unpack on a CPU; more wait for the memory."""


def packed_as(model: nn.Module, how: Mapping[str, Quantization]) -> None:
    """Give each module of `model` whose path is in `how` its packed form, ready to be filled.

    Modules that cannot be packed so keep their form.
    """

    def choose(path: str, module: nn.Module) -> bool | dict[str, int | str]:
        packing = how.get(path)
        if packing is None or not packable(module, packing.group_size):
            return False
        return {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}

    nn.quantize(model, class_predicate=choose)


def quantize(model: nn.Module, packing: Quantization) -> dict[str, Quantization]:
    """Round every matrix of `model` to the nearest of its group's levels; how each was packed.

    Routers stay as they are: they are small, and a token sent elsewhere is a large error. Matrices
    whose rows do not divide into groups stay as well.
    """
    packed: dict[str, Quantization] = {}

    def choose(path: str, module: nn.Module) -> bool:
        if packable(module, packing.group_size) and not path.endswith("mlp.gate"):
            packed[path] = packing
        return path in packed

    nn.quantize(
        model,
        group_size=packing.group_size,
        bits=packing.bits,
        mode=packing.mode,
        class_predicate=choose,
    )
    if not packed:
        raise InvalidArgumentError(
            f"no matrix has rows of a multiple of {packing.group_size} weights; "
            "choose a smaller group size"
        )
    return packed


def packable(module: nn.Module, group_size: int) -> bool:
    """Whether a module is a matrix whose rows divide into groups of that size."""
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0


def dequantize(module: nn.Module, dtype: mx.Dtype) -> None:
    """Unpack the quantized layers inside `module`, in place."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(_fill, _replaced(module, dtype)))


class Fill(NamedTuple):
    """A dense block still to be computed: out = codes * scale + bias."""

    codes: npt.NDArray[np.uint8]
    """(groups, bytes)"""
    scale: npt.NDArray[np.float32]
    """(groups, 1)"""
    bias: npt.NDArray[np.float32]
    """(groups, 1)"""
    bits: int
    out: npt.NDArray[np.float32]
    """(groups, weights)"""


def _replaced(module: nn.Module, dtype: mx.Dtype) -> Iterator[Fill]:
    """Put dense layers in the place of quantized ones; yields what of their weights is to do."""
    found = list(module.named_modules())
    while found:  # dropped one by one, so that what is packed does not outlive its dense form
        path, child = found.pop()
        if isinstance(child, nn.QuantizedLinear):
            plain: nn.Module = nn.Linear(1, 1, bias=False)
        elif isinstance(child, nn.QuantizedEmbedding):
            plain = nn.Embedding(1, 1)
        else:
            continue
        if on_cpu() and child.mode == "affine" and child.bits in (4, 8):
            dense, fills = _unpack_on_cpu(child.weight, child.scales, child.biases, child.bits)
            yield from fills
        else:
            dense = mx.dequantize(
                child.weight,
                child.scales,
                child.get("biases"),
                group_size=child.group_size,
                bits=child.bits,
                mode=child.mode,
            )
        plain.weight = dense.astype(dtype)
        if "bias" in child:
            plain.bias = child.bias.astype(dtype)
        replace(module, path, plain)


def _unpack_on_cpu(
    weight: mx.array, scales: mx.array, biases: mx.array, bits: int
) -> tuple[mx.array, list[Fill]]:
    """mx.dequantize in float32, several times faster than its CPU kernel, once the fills are done.

    They write into MLX's own memory, to spare a copy.
    """
    codes = np.asarray(weight).view(np.uint8).reshape(scales.size, -1)
    scale = np.asarray(scales.astype(mx.float32)).reshape(-1, 1)
    bias = np.asarray(biases.astype(mx.float32)).reshape(-1, 1)
    dense = mx.zeros((scales.size, codes.shape[1] * 8 // bits))
    out = np.array(dense, copy=False)
    share = -(-scales.size // THREADS)
    parts = [slice(start, start + share) for start in range(0, scales.size, share)]
    fills = [Fill(codes[part], scale[part], bias[part], bits, out[part]) for part in parts]
    return dense.reshape(*weight.shape[:-1], -1), fills


def _fill(work: Fill) -> None:
    """A table turns each byte into the floats it packs; scale and bias follow while the block is in
    the processor's cache."""
    codes, scale, bias, bits, out = work
    table = _byte_table(bits)
    block = max(1, (1 << 17) // out.shape[1])
    scratch = np.empty((block, codes.shape[1]), table.dtype)
    for start in range(0, len(codes), block):
        rows = slice(start, min(start + block, len(codes)))
        wide = scratch[: rows.stop - start]
        table.take(codes[rows], mode="clip", out=wide)
        floats = wide.view(np.float32)
        np.multiply(floats, scale[rows], out=floats)
        np.add(floats, bias[rows], out=out[rows])


@cache
def _byte_table(bits: int) -> npt.NDArray[np.unsignedinteger[Any]]:
    """For each byte the codes in it as float32, lowest bits first, seen as one wide integer."""
    byte = np.arange(256)[:, None]
    codes = (byte >> np.arange(0, 8, bits)) & (2**bits - 1)
    return codes.astype(np.float32).view(np.uint64 if bits == 4 else np.uint32).reshape(-1)


def replace(module: nn.Module, path: str, child: nn.Module) -> None:
    """Put `child` where `path` leads inside `module`."""
    *parents, name = path.split(".")
    for parent in parents:
        module = module[int(parent)] if isinstance(module, list) else module[parent]
    module[int(name) if isinstance(module, list) else name] = child


Parts = Mapping[str, mx.array]
"""A packed matrix: `weight`, `scales` and, in affine mode, `biases`, as a checkpoint has them."""


def unpack(parts: Parts, packing: Quantization) -> mx.array:
    """The matrix (out, in) in float32."""
    dense = mx.dequantize(
        parts["weight"],
        parts["scales"],
        parts.get("biases"),
        group_size=packing.group_size,
        bits=packing.bits,
        mode=packing.mode,
    )
    return dense.astype(mx.float32)
