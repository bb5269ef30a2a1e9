"""Packing matrices into few bits, and unpacking them again."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from .config import Quantization
from .device import on_cpu
from .errors import InvalidArgumentError


def packed_as(model: nn.Module, how: Mapping[str, Quantization]) -> None:
    """Give each module of `model` whose path is in `how` its packed form, ready to be filled.

    Modules that cannot be packed so keep their form.
    """

    def choose(path: str, module: nn.Module) -> bool | dict[str, int | str]:
        packing = how.get(path)
        if packing is None or not _packable(module, packing.group_size):
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
        if _packable(module, packing.group_size) and not path.endswith("mlp.gate"):
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


def _packable(module: nn.Module, group_size: int) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0


def dequantize(module: nn.Module, dtype: mx.Dtype) -> None:
    """Unpack the quantized layers inside `module`, in place."""
    for path, child in list(module.named_modules()):
        if isinstance(child, nn.QuantizedLinear):
            plain: nn.Module = nn.Linear(1, 1, bias=False)
        elif isinstance(child, nn.QuantizedEmbedding):
            plain = nn.Embedding(1, 1)
        else:
            continue
        plain.weight = _unpack(child).astype(dtype)
        if "bias" in child:
            plain.bias = child.bias.astype(dtype)
        replace(module, path, plain)


def _unpack(layer: nn.Module) -> mx.array:
    """The dense weight of a quantized layer."""
    if on_cpu() and layer.mode == "affine" and layer.bits in (4, 8):
        return _unpack_on_cpu(layer.weight, layer.scales, layer.biases, layer.bits)
    return mx.dequantize(
        layer.weight,
        layer.scales,
        layer.get("biases"),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
    )


def _unpack_on_cpu(weight: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """mx.dequantize in float32, several times faster than its CPU kernel.

    A table turns each byte into the floats it packs; scale and bias follow while the block is in
    the processor's cache. The result is written into MLX's own memory, to spare a copy.
    """
    codes = np.asarray(weight).view(np.uint8).reshape(scales.size, -1)
    scale = np.asarray(scales.astype(mx.float32)).reshape(-1, 1)
    bias = np.asarray(biases.astype(mx.float32)).reshape(-1, 1)
    table = _byte_table(bits)
    width = table.itemsize // 4 * codes.shape[1]
    dense = mx.zeros((scales.size, width))
    out = np.array(dense, copy=False)
    block = max(1, (1 << 16) // width)
    scratch = np.empty((block, codes.shape[1]), table.dtype)
    for start in range(0, scales.size, block):
        rows = slice(start, min(start + block, scales.size))
        wide = scratch[: rows.stop - start]
        table.take(codes[rows], mode="clip", out=wide)
        floats = wide.view(np.float32)
        np.multiply(floats, scale[rows], out=floats)
        np.add(floats, bias[rows], out=out[rows])
    return dense.reshape(*weight.shape[:-1], -1)


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
