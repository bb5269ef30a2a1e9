"""GPTQ: less error in what a matrix computes than rounding to the nearest, in MLX's own packing."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from minicpm_mlx.model.config_sections import Quantization
from minicpm_mlx.quantization import rounding
from minicpm_mlx.quantization.gptq import Rounder, _upper, grid, nearest, packed

RANDOM = np.random.default_rng(0)


def unpacked(found: Any, group: int) -> np.ndarray:
    out, width = found.codes.shape
    codes = found.codes.reshape(out, width // group, group).astype(np.float32)
    return (codes * found.scales[..., None] + found.biases[..., None]).reshape(out, width)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_the_packing_is_mlx_s(bits: int) -> None:
    weight = RANDOM.normal(size=(24, 128)).astype(np.float32)
    found = Rounder(np.eye(128, dtype=np.float32))(weight, bits, 64, mx.float32)
    scales, biases = mx.array(found.scales), mx.array(found.biases)
    theirs = mx.dequantize(packed(found, bits), scales, biases, group_size=64, bits=bits)
    np.testing.assert_allclose(np.array(theirs), unpacked(found, 64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_outputs_are_nearer_than_by_rounding_to_the_nearest(bits: int) -> None:
    weight = RANDOM.normal(size=(48, 128)).astype(np.float32)
    mixed = RANDOM.normal(size=(128, 128)) * RANDOM.uniform(0.1, 3, 128)
    x = (RANDOM.normal(size=(1000, 128)) @ mixed).astype(np.float32)
    found = unpacked(Rounder(x.T @ x)(weight, bits, 64, mx.float16), 64)
    codes, scales, biases = mx.quantize(mx.array(weight), group_size=64, bits=bits)
    nearest = np.array(mx.dequantize(codes, scales, biases, group_size=64, bits=bits))
    errors = [np.square(x @ (rounded - weight).T).mean() for rounded in (found, nearest)]
    assert errors[0] < 0.5 * errors[1]


def test_a_grid_that_is_there_already_is_found_again() -> None:
    codes = RANDOM.integers(3, 14, size=(16, 64))  # not all of a grid's levels are in use
    scale = RANDOM.uniform(0.5, 2, size=(16, 1))
    weight = (codes * scale - 4).astype(np.float32)
    x = RANDOM.normal(size=(200, 64)).astype(np.float32)
    found = unpacked(Rounder(x.T @ x)(weight, 4, 64, mx.float32), 64)
    np.testing.assert_allclose(found, weight, atol=1e-4)


def test_inputs_never_seen_do_no_harm() -> None:
    weight = RANDOM.normal(size=(8, 64)).astype(np.float32)
    found = Rounder(np.zeros((64, 64), np.float32))(weight, 4, 32, mx.float16)
    assert np.isfinite(unpacked(found, 32)).all()
    assert np.abs(unpacked(found, 32) - weight).max() < 0.5
    zero = Rounder(np.eye(64, dtype=np.float32))(np.zeros((8, 64), np.float32), 4, 32, mx.float16)
    assert (unpacked(zero, 32) == 0).all()


def test_the_factor_is_that_of_the_inverse_in_double_precision() -> None:
    x = RANDOM.normal(size=(300, 96)) @ RANDOM.normal(size=(96, 96))
    hessian = x.T @ x
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(96)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    found = _upper(hessian.astype(np.float32))
    np.testing.assert_allclose(found, upper, rtol=2e-3, atol=2e-4 * np.abs(upper).max())
    assert (np.tril(found, -1) == 0).all()


def test_columns_one_by_one_as_the_paper_has_it() -> None:
    """Against the method in full: each column's error is taken up by all columns to come."""
    weight = RANDOM.normal(size=(6, 64)).astype(np.float32)
    x = RANDOM.normal(size=(400, 64)) * RANDOM.uniform(0.2, 2, 64)
    hessian = (x.T @ x).astype(np.float32)
    found = Rounder(hessian)(weight, 4, 32, mx.float32)
    inverse = np.linalg.inv(hessian + 0.01 * np.diag(hessian).mean() * np.eye(64))
    rest, codes = weight.astype(np.float64), np.empty((6, 64))
    for at in range(64):
        if at % 32 == 0:
            scale, bias = grid(
                rest[:, at : at + 32].astype(np.float32),
                np.diag(hessian)[at : at + 32],
                15,
                mx.float32,
            )
        codes[:, at] = np.clip(np.rint((rest[:, at] - bias) / scale), 0, 15)
        error = (rest[:, at] - (codes[:, at] * scale + bias)) / inverse[0, 0]
        rest[:, at:] -= error[:, None] * inverse[0]
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    assert (found.codes == codes).mean() > 0.99  # ties may tip


def test_rows_in_parts_are_the_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = RANDOM.normal(size=(23, 64)).astype(np.float32)
    x = RANDOM.normal(size=(200, 64)).astype(np.float32)
    packing = Quantization(bits=4, group_size=32)
    whole = rounding.by_gptq(mx.array(weight), x.T @ x, packing)
    monkeypatch.setattr(rounding, "ROWS", 5)
    parts = rounding.by_gptq(mx.array(weight), x.T @ x, packing)
    unpack = [mx.dequantize(*arrays, group_size=32, bits=4) for arrays in (whole, parts)]
    np.testing.assert_allclose(np.array(unpack[0]), np.array(unpack[1]), atol=1e-6)


def test_nearest_is_the_grid_group_by_group() -> None:
    weight = RANDOM.normal(size=(7, 128)).astype(np.float32)
    importance = RANDOM.uniform(0.1, 2, 128).astype(np.float32)
    found = nearest(weight, importance, 3, 32, mx.float16)
    for start in range(0, 128, 32):
        block = weight[:, start : start + 32]
        scale, bias = grid(block, importance[start : start + 32], 7, mx.float16)
        codes = np.clip(np.rint((block - bias[:, None]) / scale[:, None]), 0, 7)
        wanted = codes * scale[:, None] + bias[:, None]
        np.testing.assert_allclose(found[:, start : start + 32], wanted, atol=1e-5)
