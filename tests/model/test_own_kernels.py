"""Kernels of our own compute what their references compute, and are not used where they do not.

A shim compiles their bodies with the system's C++ compiler and steps a threadgroup's lanes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import pytest

from minicpm_mlx import device
from minicpm_mlx.engine import KVCache
from minicpm_mlx.model.fused import fuse
from minicpm_mlx.model.kernels import own
from support import metal_shim
from support.random_models import IDS, MLA, MOE, random_model

EPS = 1e-5


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU by the shim."""
    if metal_shim.COMPILER is None:
        pytest.skip("no C++ compiler (c++, g++ or clang++) to compile Metal's kernels with")
    monkeypatch.setattr(mx.fast, "metal_kernel", metal_shim.metal_kernel)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(own, "WIDTHS", (300,))
    own.add_norm_fault.cache_clear()
    yield
    own.add_norm_fault.cache_clear()


def inputs(rows: int, width: int, dtype: mx.Dtype, scale: float) -> list[mx.array]:
    shapes = ((2, rows, width), (2, rows, width), (width,))
    keys = mx.random.split(mx.random.key(rows * width), 3)
    pairs = zip(shapes, keys, strict=True)
    return [(scale * mx.random.normal(shape, key=key)).astype(dtype) for shape, key in pairs]


def check_agrees(rows: int, width: int, dtype: mx.Dtype, scale: float = 1.0) -> None:
    x, delta, weight = inputs(rows, width, dtype, scale)
    y, normed = own.add_norm_kernel(width, dtype, EPS)(x, delta, weight)
    expected = own.add_norm_reference(x, delta, weight, EPS)
    assert mx.array_equal(y, expected[0])
    assert (y.dtype, normed.dtype, normed.shape) == (dtype, dtype, x.shape)
    wide = [array.astype(mx.float32) for array in (normed, expected[1])]
    assert mx.allclose(*wide, rtol=own.TOLERANCES[dtype], atol=own.TOLERANCES[dtype] * own.SMALL)


@pytest.mark.parametrize("dtype", own.TYPES, ids=str)
def test_the_kernel_is_its_reference(gpu: None, dtype: mx.Dtype) -> None:
    for scale in (1e-3, 1.0, 100.0):
        check_agrees(2, 331, dtype, scale)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", own.TYPES, ids=str)
@pytest.mark.parametrize("width", [1, 31, 33, 128, 129, 576, 1536, 2304, 2560, 4096, 5001])
def test_the_kernel_is_its_reference_at_every_width(gpu: None, dtype: mx.Dtype, width: int) -> None:
    check_agrees(1, width, dtype)
    check_agrees(9, width, dtype)


def test_a_kernel_that_agrees_is_chosen(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own.checks() == [own.KernelCheck("add_norm", True)]
    x, delta, weight = inputs(1, 300, mx.float16, 1.0)
    expected = own.add_norm_reference(x, delta, weight.astype(mx.float32), EPS)
    monkeypatch.setattr(own, "add_norm_reference", lambda *_: expected)
    add_norm = own.add_norm(300, mx.float16, EPS)
    assert add_norm(x, delta, weight) is not expected
    assert add_norm(x, delta, weight.astype(mx.float32)) is expected  # of mixed types


MISTAKES = {
    "no barrier": ("threadgroup_barrier(mem_flags::mem_threadgroup);", "", "order of the lanes"),
    "no eps": (" + EPS", " + 1e-2f", "differed by"),
    "no guard": ("if (column < WIDTH) normed", "normed", "writes outside"),
    "one simdgroup": ("? sums[lane % 32] :", "? sums[0] :", "differed by"),
    "of unrounded sums": ("float(sum);", "float(x[row + column]);", "differed by"),
    "no sum": ("y[row + column] = sum;", "", "differed by nan"),
    "one lane waits": (
        "threadgroup_barrier(",
        "if (lane) threadgroup_barrier(",
        "wait at different",
    ),
    "a typing error": ("const int lane", "const itn lane", "did not compile in float32, 300 wide"),
}


@pytest.mark.parametrize(("right", "wrong", "reason"), MISTAKES.values(), ids=MISTAKES)
def test_a_kernel_with_a_mistake_is_not_chosen(
    gpu: None, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str, reason: str
) -> None:
    assert right in own.ADD_NORM.body
    body = own.ADD_NORM.body.replace(right, wrong)
    monkeypatch.setattr(own, "ADD_NORM", replace(own.ADD_NORM, body=body))
    (check,) = own.checks()
    assert not check.chosen
    assert reason in str(check.reason)
    assert "\n" not in str(check.reason)
    x, delta, weight = inputs(1, 300, mx.float32, 1.0)
    found = own.add_norm(300, mx.float32, EPS)(x, delta, weight)
    assert mx.array_equal(found[1], own.add_norm_reference(x, delta, weight, EPS)[1])


def test_the_switch_and_a_cpu_leave_the_reference(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(own.SWITCH, "0")
    assert own.checks() == [
        own.KernelCheck("add_norm", False, "switched off by MINICPM_MLX_OWN_KERNELS=0")
    ]
    monkeypatch.delenv(own.SWITCH)
    monkeypatch.setattr(device, "on_cpu", lambda: True)
    assert own.checks() == [own.KernelCheck("add_norm", False, "no GPU")]


@pytest.mark.parametrize(
    "shape",
    [MLA, pytest.param({}, marks=pytest.mark.slow), pytest.param(MOE, marks=pytest.mark.slow)],
    ids=["mla", "mlp", "moe"],
)
def test_a_model_with_the_kernel_is_the_model_without(
    gpu: None, shape: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_kernel = fuse(random_model(**shape))
    monkeypatch.setenv(own.SWITCH, "0")
    without = fuse(random_model(**shape))
    caches = [[KVCache() for _ in without.layers] for _ in range(2)]
    for ids in (IDS[:, :4], IDS[:, 4:5], IDS[:, 5:]):  # a prefill, a token, a guess
        logits = with_kernel(ids, caches[0])
        assert mx.allclose(logits, without(ids, caches[1]), rtol=0, atol=1e-5)


def test_the_cuda_form_defines_the_names_of_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = []
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **options: sources.append(options))
    own.add_norm_kernel(2304, mx.bfloat16, EPS)
    (options,) = sources
    assert "using T = __nv_bfloat16;" in options["source"]
    for name in ("threadgroup", "thread_position_in_threadgroup", "threadgroup_barrier"):
        assert f"#define {name}" in options["header"]


def test_bodies_are_short() -> None:
    assert len(own.ADD_NORM.body.strip().splitlines()) <= 40
