"""Lazy tensors, and the first check of a weight file, shared by all readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import WeightsError
from ..files.lfs import BEGIN, FOUND


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor of a weight file, checked against the file but not read yet."""

    shape: tuple[int, ...]
    """Sizes, as the file states them."""
    dtype: mx.Dtype
    """Element type in the file."""
    load: Callable[[], mx.array]
    """Reads the data. Nothing here keeps it: memory is freed with the caller's last reference."""

    @classmethod
    def of(cls, array: mx.array) -> LazyTensor:
        return cls(array.shape, array.dtype, lambda: array)


def is_float(dtype: mx.Dtype) -> bool:
    return bool(mx.issubdtype(dtype, mx.floating))


def dtype_name(dtype: mx.Dtype) -> str:
    """The dtype as config.json names it: "bfloat16", not "mlx.core.bfloat16"."""
    return str(dtype).removeprefix("mlx.core.")


def first_bytes(path: Path, count: int = 32) -> bytes:
    """The head of a file; WeightsError if it cannot be read or is only a Git LFS pointer."""
    try:
        with path.open("rb") as file:
            head = file.read(count)
    except OSError as error:
        raise WeightsError(
            f"{path}: expected a readable weight file, found: {error.strerror}; "
            "check the path and its permissions"
        ) from error
    if head.startswith(BEGIN):
        raise WeightsError(f"{path}: expected weights, found {FOUND}")
    return head
