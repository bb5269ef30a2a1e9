"""The kernels of a token's products."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from minicpm_mlx.bench.footprint import footprint
from minicpm_mlx.bench.products import fast_share, products, rows, summary, total_size, widens
from minicpm_mlx.bench.shapes import SHAPES, packed_config
from minicpm_mlx.model.config_sections import Quantization
from minicpm_mlx.model.kernels import qmv_rule

MLX = "0.32.4"


@pytest.mark.parametrize("shape", SHAPES)
def test_products_read_the_weights_of_a_token(shape: str) -> None:
    config = packed_config(shape)
    assert total_size(products(config, MLX)) == pytest.approx(footprint(config).weights, rel=2e-3)


def test_the_default_model_takes_the_slow_kernel_throughout() -> None:
    config = packed_config("2b-shape")
    assert {row["kernel"] for row in rows(config, MLX)} == {qmv_rule.GENERIC}
    assert fast_share(products(config, MLX, "all"), MLX) > 0.9
    assert fast_share(products(packed_config("5-2b-shape"), MLX), MLX) == 1


def test_zero_columns_are_named_where_they_help() -> None:
    assert widens(packed_config("1b-shape"), MLX, "inner")
    assert not widens(packed_config("1b-shape"), MLX, "all")  # would be the same
    assert not widens(packed_config("5-2b-shape"), MLX, "all")
    assert not widens(packed_config("moe-8x2b-shape"), MLX, "inner")
    assert widens(packed_config("3-4b-shape"), MLX, "inner")
    assert not widens(packed_config("3-4b-shape"), MLX, "all")
    assert "bench --tune" in summary(packed_config("2b-shape"), MLX)


def test_projections_of_different_bits_are_products_of_their_own() -> None:
    six = Quantization(bits=6, group_size=64)
    path = "model.layers.3.self_attn.k_proj"
    config = replace(packed_config("1b-shape"), layer_quantization=((path, six),))
    names = {(row["product"], row["bits"], row["count"]) for row in rows(config, MLX)}
    assert {("q + k + v_proj", 4, 51), ("k_proj", 6, 1), ("q_proj", 4, 1)} <= names


def test_the_table_needs_no_download(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("bench", "--predict", "--kernels", "-m", "2b-shape", "--json") == 0
    assert sum(row["share"] for row in json.loads(capsys.readouterr().out)) == pytest.approx(1)
    assert command("bench", "--predict", "--kernels", "-m", "moe-8x2b-shape") == 0
    assert "| experts' w2 | 2304 x 5760 | 4 | qmv | 40 |" in capsys.readouterr().out
    assert command("bench", "--kernels", "-m", "2b-shape") == 1
