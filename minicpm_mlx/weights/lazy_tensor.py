"""What the weight readers share: a tensor not read yet, and the first look at a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..errors import WeightsError


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor of a weight file: checked against the file, not read yet."""

    shape: tuple[int, ...]
    """Sizes, as the file states them."""
    dtype: mx.Dtype
    """Element type in the file."""
    load: Callable[[], mx.array]
    """The data. Nothing here keeps it, so memory is freed with the caller's last reference."""

    @classmethod
    def of(cls, array: mx.array) -> LazyTensor:
        """One of an array in memory."""
        return cls(array.shape, array.dtype, lambda: array)


def first_bytes(path: Path, count: int = 32) -> bytes:
    """The head of a file; WeightsError where it cannot be read or only points to the weights."""
    try:
        with path.open("rb") as file:
            head = file.read(count)
    except OSError as error:
        raise WeightsError(
            f"{path}: expected a readable weight file, found: {error.strerror}; "
            "check the path and its permissions"
        ) from error
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path}: expected weights, found a Git LFS pointer to them; run git lfs pull"
        )
    return head
