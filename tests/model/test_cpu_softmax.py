"""NumPy's exponentials give what MLX's give."""

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_mlx.model.kernels import cpu_softmax
from minicpm_mlx.model.kernels.cpu_softmax import attention, silu_mul
from support.data import same


@pytest.fixture(autouse=True)
def however_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_softmax, "FEW", 0)
    monkeypatch.setattr(cpu_softmax, "BLOCK", 50)


@settings(deadline=None, max_examples=80)
@given(
    B=st.integers(1, 2),
    K=st.integers(1, 3),
    shared=st.integers(1, 3),
    T=st.integers(1, 40),
    before=st.integers(0, 30),
    kind=st.sampled_from(["causal", "array", "added", None]),
    seed=st.integers(0, 99),
)
def test_attention_is_mlx_s(
    B: int, K: int, shared: int, T: int, before: int, kind: str | None, seed: int
) -> None:
    mx.random.seed(seed)
    S, D = before + T, 32
    q = mx.random.normal((B, K * shared, T, D)) * 4
    k, v = mx.random.normal((B, K, S, D)), mx.random.normal((B, K, S, D))
    mask: mx.array | str | None = kind
    if kind == "array":
        mask = mx.random.uniform(shape=(B, 1, T, S)) < 0.5
        mask[..., -1] = True
    elif kind == "added":
        mask = mx.random.normal((B, 1, T, S))
    mine = attention(q, k, v, scale=0.3, mask=mask)
    same(mine, mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask), 1e-4)


def test_a_row_that_sees_nothing_is_finite() -> None:
    q = mx.random.normal((1, 2, 5, 32))
    mask = mx.zeros((1, 1, 5, 5), mx.bool_)
    out = attention(q, q, q, scale=1.0, mask=mask)
    assert mx.isfinite(out).all().item()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 5, 64), (1, 3, 2, 1, 9)])
def test_silu_is_mlx_s(shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    gate, up = (mx.random.normal(shape).astype(dtype) * 100 for _ in range(2))
    mine, theirs = silu_mul(gate, up), gate * mx.sigmoid(gate) * up
    same(mine.astype(mx.float32), theirs.astype(mx.float32), 1e-4)
    halves = mx.split(mx.concatenate([gate, up], axis=-1), 2, axis=-1)  # not contiguous
    assert mx.array_equal(silu_mul(*halves), silu_mul(gate, up))
