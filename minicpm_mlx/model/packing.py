"""Packing matrices into few bits, and unpacking them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..device import on_cpu
from ..errors import InvalidArgumentError
from .config_sections import Quantization
from .kernels import cpu_unpack
from .modules import replace_module

PACKED_NAMES = ("weight", "scales", "biases")
"""Arrays of a packed matrix: codes, and each group's scale and bias; float modes have no biases."""


def apply_packing(model: nn.Module, packings: Mapping[str, Quantization]) -> None:
    """Give each module of `model` named in `packings` its packed form, ready to be filled.

    Modules that cannot be packed so keep their form.
    """

    def choose(path: str, module: nn.Module) -> bool | dict[str, int | str]:
        packing = packings.get(path)
        if packing is None or not packable(module, packing.group_size):
            return False
        return packing_options(packing)

    nn.quantize(model, class_predicate=choose)


def quantize(model: nn.Module, packing: Quantization) -> dict[str, Quantization]:
    """Round every matrix of `model` to its group's levels; return the packing by module path.

    Routers stay as they are: they are small, and a token sent to another expert is a large error.
    So do matrices whose rows do not divide into groups.
    """
    packed: dict[str, Quantization] = {}

    def choose(path: str, module: nn.Module) -> bool:
        if packable(module, packing.group_size) and not path.endswith("mlp.gate"):
            packed[path] = packing
        return path in packed

    nn.quantize(model, **packing_options(packing), class_predicate=choose)
    if not packed:
        raise InvalidArgumentError(
            f"no matrix has rows of a multiple of {packing.group_size} weights; "
            "choose a smaller group size"
        )
    return packed


def packing_options(packing: Any) -> dict[str, Any]:
    """MLX's arguments for a `Quantization`, or for the packing of a quantized layer."""
    return {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.mode}


def packable(module: nn.Module, group_size: int) -> bool:
    """Whether a module is a matrix whose rows divide into groups of that size."""
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0


def dequantize(module: nn.Module, dtype: mx.Dtype) -> None:
    """Unpack the quantized layers inside `module`, in place."""
    with ThreadPoolExecutor(cpu_unpack.THREADS) as pool:
        list(pool.map(cpu_unpack.UnpackJob.run, _make_dense(module, dtype)))


def _make_dense(module: nn.Module, dtype: mx.Dtype) -> Iterator[cpu_unpack.UnpackJob]:
    """Replace quantized layers by dense ones; yield the jobs that fill their weights."""
    modules = list(module.named_modules())
    while modules:  # dropped one by one, so that packed weights do not outlive their dense form
        path, layer = modules.pop()
        if isinstance(layer, nn.QuantizedLinear):
            plain: nn.Module = nn.Linear(1, 1, bias=False)
        elif isinstance(layer, nn.QuantizedEmbedding):
            plain = nn.Embedding(1, 1)
        else:
            continue
        if on_cpu() and layer.mode == "affine" and layer.bits in cpu_unpack.WIDE:
            dense, jobs = cpu_unpack.unpack(layer.weight, layer.scales, layer.biases, layer.bits)
            yield from jobs
        else:
            dense = dequantized_weight(layer)
        plain.weight = dense.astype(dtype)
        if "bias" in layer:
            plain.bias = layer.bias.astype(dtype)
        replace_module(module, path, plain)


def dequantized_weight(layer: nn.Module) -> mx.array:
    """The matrix (out, in) of a quantized layer, in the dtype of its scales."""
    options = packing_options(layer)
    return mx.dequantize(layer.weight, layer.scales, layer.get("biases"), **options)


PackedMatrix = Mapping[str, mx.array]
"""A packed matrix: `weight`, `scales` and, in affine mode, `biases`, as a checkpoint has them."""


def unpack(matrix: PackedMatrix, packing: Quantization) -> mx.array:
    """The matrix (out, in) in float32."""
    options = packing_options(packing)
    dense = mx.dequantize(matrix["weight"], matrix["scales"], matrix.get("biases"), **options)
    return dense.astype(mx.float32)
