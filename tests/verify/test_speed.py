"""The measurement of `doctor --verify`: a shape that fits, and rows that say what they rest on."""

from __future__ import annotations

from typing import Any

import pytest

from minicpm_mlx import Config, device
from minicpm_mlx.bench import measure, shapes
from minicpm_mlx.verify import speed
from minicpm_mlx.verify.report import Verification


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model and short tests."""
    raw = {**shapes.SHAPES["demo-shape"], "hidden_size": 128, "intermediate_size": 128}
    raw |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = Config.from_dict({**raw, "vocab_size": 512})
    monkeypatch.setattr(speed, "random_model", lambda shape: shapes.random_model(config))
    monkeypatch.setattr(speed, "works", lambda gens: measure.works(prompts=(8,), gens=(4,)))


@pytest.mark.usefixtures("small")
def test_rows_are_those_of_bench_with_what_they_are_compared_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speed, "bandwidth", lambda _: None)
    rows = speed.measure_speed()
    assert [row["test"] for row in rows] == ["pp8", "tg4"]
    for row in rows:
        assert {"chip", "power", "thermal", "mlx", "avg_ts", "test_time"} < set(row)
        assert row["expected_ts"] is None  # no chip of Apple's
        assert row["bandwidth_measured"]
    assert rows[1]["roofline"] > 0
    assert "% of the measured bandwidth" in Verification(machine={}, checks=[], bench=rows).speed()


@pytest.mark.usefixtures("small")
def test_a_known_chip_has_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Any] = {"bandwidth": lambda _: 120.0, "choose_shape": lambda: "2b-shape"}
    for name, value in known.items():
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(speed.device, "chip", lambda: "Apple M4")
    read, decode = speed.measure_speed()
    assert read["expected_ts"] is None
    assert 30 < decode["expected_ts"] < 80
    assert not decode["bandwidth_measured"]


@pytest.mark.parametrize(
    ("gigabytes", "shape"),
    [(100, "2b-shape"), (6, "2b-shape"), (3, "1b-shape"), (0.5, "demo-shape")],
)
def test_the_largest_shape_that_takes_half_of_the_memory_is_measured(
    monkeypatch: pytest.MonkeyPatch, gigabytes: float, shape: str
) -> None:
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(device, "available_memory", lambda: int(gigabytes * 1e9))
    assert speed.choose_shape() == shape


def test_a_cpu_measures_the_demos_shape() -> None:
    if device.on_cpu():
        assert speed.choose_shape() == "demo-shape"
