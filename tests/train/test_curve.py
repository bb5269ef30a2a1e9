"""The curve of a run: blocks in a line of text, and a chart that is a picture of its log."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_mlx.errors import InvalidArgumentError, MissingPackageError
from minicpm_mlx.files.plots import check_chart_path
from minicpm_mlx.train.tracking.curve import BLOCKS, draw_curve, smoothed, sparkline
from minicpm_mlx.train.tracking.events import Started, Validated
from minicpm_mlx.train.tracking.jsonl_log import LogRecord
from support.fake_events import trained

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # matplotlib's first two colours


def log(
    losses: list[float], validation: list[float] | None = None, rate: float = 1e-4
) -> list[LogRecord]:
    found = [LogRecord(0.0, Started(step=0, steps=len(losses)))]
    for step, loss in enumerate(losses, 1):
        event = trained(step, loss, learning_rate=rate * (1 - step / len(losses)))
        found.append(LogRecord(float(step), event))
    for number, loss in enumerate(validation or []):
        found.append(LogRecord(0.0, Validated(step=10 * number, loss=loss, best=True)))
    return found


def pixels(path: Path) -> np.ndarray:
    """A picture's pixels (height, width, 4)."""
    image = pytest.importorskip("matplotlib.image")
    return np.rint(np.asarray(image.imread(path, format="png")) * 255).astype(int)


def shows(picture: np.ndarray, colour: tuple[int, ...]) -> bool:
    return bool((np.abs(picture[..., :3] - colour).max(axis=-1) < 3).any())


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 5, ""),
        ([3.0], 5, "▄"),
        ([2.0, 2.0, 2.0], 5, "▄▄▄"),
        ([1, 2, 3, 4, 5, 6, 7, 8], 8, "▁▂▃▄▅▆▇█"),
        ([8, 8, 4, 4, 1, 1], 3, "█▄▁"),
        ([1.0, math.nan, 2.0], 3, "▁ █"),
        ([1.0, math.inf, 2.0, -math.inf], 9, "▁ █ "),
        ([math.nan, math.nan], 2, "  "),
        ([1.0, math.nan, 3.0, 3.0], 2, "▁█"),
        ([-1.7e308, 1.7e308], 2, "▁█"),
        ([5e-324, 0.0], 2, "▄▄"),
    ],
)
def test_a_line_of_blocks(values: list[float], width: int, line: str) -> None:
    assert sparkline(values, width) == line


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.floats(), max_size=60), st.integers(1, 40))
def test_a_line_of_blocks_has_its_width_and_its_extremes(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == min(len(values), width)
    assert set(line) <= set(BLOCKS + " ")
    if len(set(line) - {" "}) > 1:
        assert {"▁", "█"} <= set(line)
    if len(values) <= width:
        finite = [(value, b) for value, b in zip(values, line, strict=True) if math.isfinite(value)]
        assert [block for _, block in sorted(finite)] == sorted(block for _, block in finite)


def test_a_line_of_blocks_needs_a_column() -> None:
    with pytest.raises(InvalidArgumentError, match="width must be 1 or more"):
        sparkline([1.0], 0)


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_smoothed_values_lie_between_those_before(values: list[float]) -> None:
    for number, value in enumerate(smoothed(values), 1):
        so_far = values[:number]
        assert min(so_far) - 1e-6 <= value <= max(so_far) + 1e-6


def test_smoothing_begins_at_the_first_value_and_passes_over_nan() -> None:
    assert list(smoothed([2.0, math.nan])) == pytest.approx([2.0, 2.0])
    assert math.isnan(next(smoothed([math.nan])))
    assert list(smoothed([0.0] * 50 + [1.0]))[-1] == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("validated", [False, True])
def test_a_chart_shows_what_was_measured(validated: bool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "curve.png"
    losses = [1 + 2 * math.exp(-step / 30) for step in range(100)]
    draw_curve(log(losses, [2.8, 1.5] if validated else None), path, "my-run")
    assert 10_000 < path.stat().st_size < 500_000
    picture = pixels(path)
    assert picture.shape == (600, 1080, 4)
    assert shows(picture, BLUE)
    assert shows(picture, ORANGE) == validated
    assert [file.name for file in tmp_path.iterdir()] == ["curve.png"]


@pytest.mark.parametrize(
    ("losses", "name"),
    [([1.0], "$x^{$"), ([math.nan, math.nan], ""), ([1e300, math.nan, -1.0], "")],
)
def test_any_run_can_be_drawn(losses: list[float], name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "损失.png"
    draw_curve(log(losses, [math.nan], rate=0.0), path, name)
    assert shows(pixels(path), (255, 255, 255))


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(InvalidArgumentError, match=r"a\.png: not drawn; the log holds no step"):
        draw_curve(log([], [1.0]), tmp_path / "a.png")
    with pytest.raises(InvalidArgumentError, match="no chart can be written there"):
        draw_curve(log([1.0]), tmp_path / "none" / "a.png")


def test_a_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'minicpm-mlx\[plot\]'"):
        check_chart_path(tmp_path / "curve.png")
