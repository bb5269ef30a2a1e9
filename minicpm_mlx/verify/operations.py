"""Single operations of the inference form against NumPy in float64: a wrong one is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import device
from ..device import DTYPES
from ..engine import KVCache
from ..model import kernels
from ..model.feed_forward import Activation
from ..model.kernels import own
from ..model.kernels.cpu_gemv import split_matrices
from ..model.rope import Rope
from .cases import CASES, LENGTH, GoldenCase
from .formats import SHORT_FLOAT32, rounds_float32
from .results import (
    FAIL,
    PASS,
    SKIP,
    Array,
    CheckResult,
    Errors,
    as_numpy,
    catching,
    relative_error,
    without_paths,
)

LIMITS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 0.15}
"""Largest error of one operation, in units of the result's deviation.

Measured on a CPU: 1e-5, 0.007 and 0.06."""


def check_operations() -> Iterator[CheckResult]:
    """Check each operation in each number format."""
    for format in DTYPES:
        dtype = device.as_dtype(format)
        exact = format != "float32" or not rounds_float32()
        for name, check in OPERATIONS.items():
            errors = Errors(name, format, LIMITS[format if exact else SHORT_FLOAT32])
            with catching(name, errors):
                check(dtype, errors)
            yield errors.result()


def _random(seed: int, *shape: int, dtype: mx.Dtype) -> mx.array:
    """Normal numbers that the dtype holds exactly."""
    values = np.random.default_rng(seed).normal(size=shape)
    return mx.array(values.astype(np.float32)).astype(dtype)


def _check_rotation(dtype: mx.Dtype, errors: Errors) -> None:
    for case in CASES:
        x = _random(1, 2, 3, 7, Rope(case.config).width, dtype=dtype)
        rope, offsets = Rope(case.config), mx.array([0, 41])
        for offset in (0, 41):
            found = rope.at(offset, 7, LENGTH)(x)
            errors.add(case.name, relative_error(found, _rotated(case, x, np.full(2, offset))))
        found = rope.at(offsets, 7, mx.array([LENGTH, LENGTH]))(x)
        errors.add(f"{case.name}, batch", relative_error(found, _rotated(case, x, offsets)))


def _rotated(case: GoldenCase, x: mx.array, offsets: mx.array | Array) -> Array:
    """Rotate x (B, H, T, D) from a position a row on."""
    D, scaling = x.shape[-1], case.raw.get("rope_scaling") or {}
    kind, base, amplitude = scaling.get("type", scaling.get("rope_type")), case.theta, 1.0
    factors, context = np.ones(D // 2), case.raw["max_position_embeddings"]
    if kind == "dynamic":
        stretch = scaling["factor"] * LENGTH / context - (scaling["factor"] - 1)
        base *= stretch ** (D / (D - 2))
    elif kind == "linear":
        factors *= scaling["factor"]
    elif kind == "longrope":
        original = scaling["original_max_position_embeddings"]
        factors *= scaling["long_factor" if context > original else "short_factor"]
        amplitude = math.sqrt(1 + math.log(context / original) / math.log(original))
    positions = np.array(offsets)[:, None] + np.arange(x.shape[2])  # (B, T)
    angles = positions[:, None, :, None] / (factors * base ** (np.arange(0, D, 2) / D))
    cos, sin = amplitude * np.cos(angles), amplitude * np.sin(angles)
    left, right = np.split(as_numpy(x), 2, axis=-1)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def _check_attention(dtype: mx.Dtype, errors: Errors) -> None:
    # (heads, heads of keys, queries, keys, width): prompts, steps, and a draft's few queries
    shapes = {
        "prompt": ((9, 9, 64, 64, 64), (16, 2, 70, 70, 128)),
        "step": ((9, 9, 1, 300, 64), (16, 2, 1, 1100, 128)),
        "draft": ((9, 9, 5, 300, 64), (16, 2, 5, 1100, 128)),
    }
    for name, sizes in shapes.items():
        for H, K, T, S, D in sizes:
            q = _random(1, 1, H, T, D, dtype=dtype)
            k, v = (_random(seed, 1, K, S, D, dtype=dtype) for seed in (2, 3))
            mask = "causal" if T > 1 else None
            found = kernels.attention()(q, k, v, scale=D**-0.5, mask=mask)
            errors.add(f"{name}, {H} heads", relative_error(found, _attended(q, k, v)))


def _attended(q: mx.array, k: mx.array, v: mx.array) -> Array:
    (_, H, T, D), (_, K, S, _) = q.shape, k.shape
    wide, keys, values = as_numpy(q)[0], as_numpy(k)[0], as_numpy(v)[0]
    keys, values = (np.repeat(x, H // K, axis=0) for x in (keys, values))
    scores = wide @ keys.transpose(0, 2, 1) / math.sqrt(D)
    scores = np.where(np.tri(T, S, S - T, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ values)[None]


def _check_activation(dtype: mx.Dtype, errors: Errors) -> None:
    for case in CASES:
        name = case.config.hidden_act
        for rows in (1, 40):
            gate, up = (_random(seed, 1, rows, 1024, dtype=dtype) for seed in (1, 2))
            found, x = Activation(case.config).for_inference()(gate, up), as_numpy(gate)
            active = np.where(x > case.config.hidden_act_param, x, 0)
            if name == "silu":
                active = x / (1 + np.exp(-x))
            errors.add(name, relative_error(found, active * as_numpy(up)))


def _check_norm(dtype: mx.Dtype, errors: Errors) -> None:
    for width in (576, 2304):
        for rows in (1, 5):
            x, delta = (_random(seed, 1, rows, width, dtype=dtype) for seed in (1, 2))
            weight = _random(3, width, dtype=dtype)
            total, found = own.add_norm(width, dtype, 1e-5)(x, delta, weight)
            y = as_numpy(x) + as_numpy(delta)
            expected = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * as_numpy(weight)
            errors.add(f"sum, {width} wide", relative_error(total, y))
            errors.add(f"norm, {width} wide", relative_error(found, expected))


def _check_products(dtype: mx.Dtype, errors: Errors) -> None:
    for columns, rows in ((576, 1003), (1024, 1500)):
        weight = _random(1, rows, columns, dtype=dtype)
        packed = mx.quantize(weight, group_size=64, bits=4)
        layers = nn.Module()
        layers.dense = nn.Linear(1, 1, bias=False)
        layers.dense.weight = weight
        split_matrices(layers)  # as on a CPU
        for count in (1, 5, 40):
            x = _random(2, 1, count, columns, dtype=dtype)
            shape = f"{count} x {columns} x {rows}"
            found = layers.dense(x)
            errors.add(shape, relative_error(found, as_numpy(x) @ as_numpy(weight).T))
            if device.on_cpu() and dtype != mx.float32:
                continue  # it would sum in 16 bits; the program computes in float32 there
            found = mx.quantized_matmul(x, *packed, transpose=True, group_size=64, bits=4)
            dense = as_numpy(_unpacked(*packed))
            errors.add(f"{shape}, 4 bits", relative_error(found, as_numpy(x) @ dense.T))


def _unpacked(codes: mx.array, scales: mx.array, biases: mx.array) -> Array:
    """Codes of 4 bits in groups of 64, the first of eight lowest, as numbers."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    levels = (np.array(codes)[..., None] >> shifts & 15).reshape(len(codes), -1)
    scale, bias = (np.repeat(as_numpy(array), 64, axis=1) for array in (scales, biases))
    return levels * scale + bias


def _check_cache(dtype: mx.Dtype, errors: Errors) -> None:
    """Keys and values come back as they were written: beyond a full buffer, and after a trim."""
    keys, values = (_random(seed, 1, 2, 600, 64, dtype=dtype) for seed in (1, 2))
    cache, end = KVCache(), 0
    for count in (250, 1, *[1] * 8, 200, -30, 1, 100):
        begin, end = end, end + count
        if count < 0:
            cache.trim(-count)
            continue
        found = cache.update_and_fetch(keys[:, :, begin:end], values[:, :, begin:end])
        for name, array, all_ in zip(("keys", "values"), found, (keys, values), strict=True):
            same = mx.array_equal(array, all_[:, :, :end]).item()
            errors.add(name, 0.0 if same else math.inf)


OPERATIONS: dict[str, Callable[[mx.Dtype, Errors], None]] = {
    "rotation": _check_rotation,
    "attention": _check_attention,
    "activation": _check_activation,
    "residual sum and norm": _check_norm,
    "products": _check_products,
    "key-value cache": _check_cache,
}


def check_own_kernels() -> Iterator[CheckResult]:
    """Report each GPU kernel of our own: one that is not used although there is a GPU fails."""
    for check in own.checks():
        unused = own.unavailable()
        yield CheckResult(
            name=f"own kernel {check.name} = reference",
            outcome=PASS if check.chosen else SKIP if unused else FAIL,
            expected="chosen" if not unused else "",
            got="chosen" if check.chosen else f"not chosen: {without_paths(check.reason or '')}",
        )
