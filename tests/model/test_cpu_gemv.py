"""Single rows through a matrix in blocks: the same product as MLX's own."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx import device
from minicpm_mlx.model.kernels import cpu_gemv
from minicpm_mlx.model.kernels.cpu_gemv import SplitEmbedding, SplitLinear, split_matrices
from support.data import same


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_gemv, "COPIED", 200)
    monkeypatch.setattr(cpu_gemv, "BLOCK", 90)
    monkeypatch.setattr(device, "blas", "libopenblas.so.0")


class Net(nn.Module):
    def __init__(self, N: int, K: int, bias: bool):
        super().__init__()
        self.layers = [nn.Linear(K, N, bias=bias)]
        self.embed = nn.Embedding(N, K)


@settings(deadline=None, max_examples=60)
@given(
    N=st.integers(1, 97),
    K=st.integers(3, 250),
    bias=st.booleans(),
    shape=st.sampled_from([(), (1,), (1, 1), (1, 3), (2, 1)]),
)
def test_blocks_give_the_whole_product(N: int, K: int, bias: bool, shape: tuple[int, ...]) -> None:
    net: Any = Net(N, K, bias)
    linear, embedding = net.layers[0], net.embed
    split_matrices(net)
    assert (type(net.layers[0]) is SplitLinear) == (N > 1 and N * K >= 200)
    assert (type(net.embed) is SplitEmbedding) == (N > 1 and N * K >= 200)
    x = mx.random.normal((*shape, K))
    same(net.layers[0](x), linear(x))
    same(net.embed.as_linear(x), embedding.as_linear(x))
    ids = mx.array([[0, N - 1]])
    assert mx.array_equal(net.embed(ids), embedding(ids))


@pytest.mark.parametrize("other", [None, "libmkl_rt.so.2"])
def test_another_blas_multiplies_as_it_is(
    other: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "blas", other)
    net = Net(50, 20, False)
    split_matrices(net)
    assert type(net.layers[0]) is nn.Linear


def test_a_model_decodes_the_same_and_keeps_one_copy(
    demo: mm.LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "blas", None)
    plain = mm.load("demo", dtype="float32")
    monkeypatch.setattr(device, "blas", "libopenblas.so.0")
    mx.clear_cache()
    before = mx.get_active_memory()
    split_matrices(plain.model)
    assert mx.get_active_memory() - before < 1_000_000
    whole, split = (
        lm.model.logits(lm.model.hidden(mx.array([[5]]), lm.session().cache))
        for lm in (demo, plain)
    )
    largest = mx.abs(whole).max()  # of which float32's rounding is a share, also in small ones
    same(whole / largest, split / largest)
