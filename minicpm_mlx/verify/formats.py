"""Number formats in which the device is checked, and how far rounding may take a result."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import numpy as np

from .. import device
from ..weights.lazy_tensor import dtype_name
from .results import as_numpy

FORMATS = (*device.DTYPES, "4 bits")

LIMITS = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 0.2}
"""Largest error of a golden case's logits, in units of their deviation.

Measured on a CPU: 1e-5, 1e-2 and 0.1; a wrong operation gives 0.5 and more."""

SHORT_FLOAT32 = "float16"
"""Format as exact as float32 products on devices that round their factors to 10 bits (TF32)."""


def compute_dtype(format: str) -> mx.Dtype:
    """The dtype that a format computes in, here; 4 bits in the one that the program chooses."""
    if format == "4 bits":
        return device.choose_dtype(mx.float16)
    return device.as_dtype(format)


def limit(format: str) -> float:
    """The largest error of logits in this format on this device."""
    name = dtype_name(compute_dtype(format))
    return LIMITS[SHORT_FLOAT32 if name == "float32" and rounds_float32() else name]


@cache
def rounds_float32() -> bool:
    """Whether this device rounds the factors of float32 products, as M5 and NVIDIA's GPUs do."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(512, 512)).astype(np.float32) for _ in range(2))
    gap = np.abs(as_numpy(mx.array(a) @ mx.array(b)) - a.astype(np.float64) @ b).max()
    # Of sums with a deviation of 22: 1e-5 of float32, 1e-2 of factors with 10 bits.
    return bool(1e-3 < gap < 0.1)
