"""Lazy operations on tensors: multiply, cast, unpack. They run when the result is loaded.

Products are computed in float32, a block of rows at a time, and rounded once. A product that does
not fit float16 is refused: too large values would become infinite, and a tensor of only tiny values
(below 6e-5, where float16 is subnormal) would lose its bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from ..errors import WeightsError
from ..model.config_sections import Quantization
from ..model.packing import PACKED_NAMES, unpack
from .checkpoint import Checkpoint
from .lazy_tensor import LazyTensor, is_float

BLOCK = 1 << 22
"""Elements held in float32 at a time."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """Loads `source` times `factor`, in `dtype`."""

    name: str
    """Name of the tensor in the checkpoint, for messages."""
    source: LazyTensor
    """Not a product itself: nested products multiply their factors, so rounding happens once."""
    factor: float
    dtype: mx.Dtype

    def __call__(self) -> mx.array:
        array = self.source.load()
        if self.factor == 1.0 and array.dtype == self.dtype:
            return array
        bits = mx.uint32 if self.dtype.size == 4 else mx.uint16
        whole = mx.zeros(array.shape, bits)
        out = np.array(whole, copy=False)  # MLX's own memory: joining blocks would take it twice
        largest = error = mx.array(0.0)
        for rows in _blocks(array):
            exact = array[rows].astype(mx.float32) * self.factor
            rounded = exact.astype(self.dtype)
            largest = mx.maximum(largest, mx.abs(exact).max())
            error = mx.maximum(error, mx.abs(exact - rounded.astype(mx.float32)).max())
            mx.eval(rounded, largest, error)
            out[rows] = np.asarray(rounded.view(bits))
        if self.dtype == mx.float16:
            self._check(error, largest)
        return whole.view(self.dtype)

    def _check(self, error: mx.array, largest: mx.array) -> None:
        # Half a unit in the last place of the largest value, if that is a normal number.
        if not (error <= largest * 2**-11).item():
            raise WeightsError(
                f"{self.name}: values up to {largest.item():.3g} do not fit float16, which holds "
                "6e-5 to 65504; choose bfloat16 or float32 (--dtype)"
            )


def scaled(name: str, tensor: LazyTensor, factor: float, dtype: mx.Dtype) -> LazyTensor:
    """`tensor` times `factor`, in `dtype`."""
    if factor == 1.0 and dtype == tensor.dtype:
        return tensor
    source, inner = tensor, tensor.load
    if isinstance(inner, Product):
        source, factor = inner.source, factor * inner.factor
    load = Product(name=name, source=source, factor=factor, dtype=dtype)
    return LazyTensor(tensor.shape, dtype, load)


def cast(checkpoint: Checkpoint, dtype: mx.Dtype) -> Checkpoint:
    """Casts all floats to `dtype`, including scales and biases of packed matrices.

    Loading raises WeightsError for values that do not fit float16.
    """
    tensors = {
        name: scaled(name, tensor, 1.0, dtype) if is_float(tensor.dtype) else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def dense(checkpoint: Checkpoint) -> Checkpoint:
    """Unpacks every packed matrix, in the format of its scales (bfloat16 in float modes)."""
    packings, tensors = checkpoint.packings, {}
    for name, tensor in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        if module not in packings or part == "bias":
            tensors[name] = tensor
        elif part == "weight":
            parts = packed_parts(checkpoint.tensors, module)
            exact = unpacked(parts, packings[module])
            tensors[name] = scaled(name, exact, 1.0, dense_dtype(parts))
    raw = {key: value for key, value in checkpoint.raw.items() if key != "quantization"}
    return Checkpoint(raw=raw, tensors=tensors)


def packed_parts(tensors: Mapping[str, LazyTensor], module: str) -> dict[str, LazyTensor]:
    """The tensors of a packed matrix by part: codes ("weight"), scales and, if affine, biases."""
    return {part: t for part in PACKED_NAMES if (t := tensors.get(f"{module}.{part}"))}


def unpacked(parts: Mapping[str, LazyTensor], packing: Quantization) -> LazyTensor:
    """The packed matrix in float32, so that a later cast is the only rounding."""
    *rows, words = parts["weight"].shape
    shape = (*rows, words * 32 // packing.bits)
    return LazyTensor(
        shape, mx.float32, lambda: unpack({part: t.load() for part, t in parts.items()}, packing)
    )


def dense_dtype(parts: Mapping[str, LazyTensor]) -> mx.Dtype:
    """The float format that a packed matrix takes when written dense."""
    scales = parts["scales"].dtype
    return scales if is_float(scales) else mx.bfloat16


def _blocks(array: mx.array) -> Iterator[slice]:
    """Slices of rows with about BLOCK elements each."""
    rows = max(1, BLOCK * array.shape[0] // max(1, array.size))
    return (slice(start, start + rows) for start in range(0, array.shape[0], rows))
