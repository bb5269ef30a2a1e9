"""Tensors made from others when they are loaded: multiplied, in another float format, unpacked.

Products are computed in float32, a block of rows at a time, and rounded once, whatever they are
made of. What float16 cannot hold is refused: values too large would become infinite, and where all
are too small (below 6e-5) they would lose their bits.
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
from .lazy_tensor import LazyTensor

BLOCK = 1 << 22
"""Elements that are in float32 at once."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """What loads `source` times `factor` in `dtype`."""

    name: str
    """Of the tensor in the checkpoint, for messages."""
    source: LazyTensor
    """Not a product itself: of a product's product, the factors are multiplied."""
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
        # Half a unit in the last place of the largest, if that is a normal number.
        if not (error <= largest * 2**-11).item():
            raise WeightsError(
                f"{self.name}: values up to {largest.item():.3g} do not fit float16, which holds "
                "6e-5 to 65504; choose bfloat16 or float32 (--dtype)"
            )


def times(name: str, tensor: LazyTensor, factor: float) -> LazyTensor:
    """`tensor` multiplied, in the format it has."""
    return derived(name, tensor, factor, tensor.dtype)


def derived(name: str, tensor: LazyTensor, factor: float, dtype: mx.Dtype) -> LazyTensor:
    """`tensor` times `factor`, in `dtype`."""
    if factor == 1.0 and dtype == tensor.dtype:
        return tensor
    source, inner = tensor, tensor.load
    if isinstance(inner, Product):
        source, factor = inner.source, factor * inner.factor
    load = Product(name=name, source=source, factor=factor, dtype=dtype)
    return LazyTensor(tensor.shape, dtype, load)


def cast(checkpoint: Checkpoint, dtype: mx.Dtype) -> Checkpoint:
    """Every float in `dtype`, the scales and biases of packed matrices among them.

    Loading raises WeightsError where float16 would lose more than it rounds anyway.
    """
    tensors = {
        name: derived(name, tensor, 1.0, dtype) if _is_float(tensor.dtype) else tensor
        for name, tensor in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def dense(checkpoint: Checkpoint) -> Checkpoint:
    """Every packed matrix unpacked, in the format of its scales (bfloat16 in float modes)."""
    how = checkpoint.packings
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        if module not in how or part == "bias":
            tensors[name] = tensor
        elif part == "weight":
            tensors[name] = _unpacked(checkpoint.tensors, module, how[module])
    raw = {key: value for key, value in checkpoint.raw.items() if key != "quantization"}
    return Checkpoint(raw=raw, tensors=tensors)


def _unpacked(tensors: Mapping[str, LazyTensor], module: str, packing: Quantization) -> LazyTensor:
    parts = {part: t for part in PACKED_NAMES if (t := tensors.get(f"{module}.{part}"))}
    codes, scales = parts["weight"], parts["scales"].dtype
    shape = (*codes.shape[:-1], codes.shape[-1] * 32 // packing.bits)

    def load() -> mx.array:
        return unpack({part: t.load() for part, t in parts.items()}, packing)

    dtype = scales if _is_float(scales) else mx.bfloat16
    exact = LazyTensor(shape, mx.float32, load)
    return derived(f"{module}.weight", exact, 1.0, dtype)


def _blocks(array: mx.array) -> Iterator[slice]:
    """Its rows, some at a time."""
    rows = max(1, BLOCK * array.shape[0] // max(1, array.size))
    return (slice(start, start + rows) for start in range(0, array.shape[0], rows))


def _is_float(dtype: mx.Dtype) -> bool:
    return bool(mx.issubdtype(dtype, mx.floating))
