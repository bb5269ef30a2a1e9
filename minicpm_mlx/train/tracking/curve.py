"""Draws the loss curve: as a line of text during a run, as a chart of its log afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...arguments import at_least_one
from ...errors import InvalidArgumentError
from ...files.plots import chart, check_chart_path
from .events import Trained, Validated
from .jsonl_log import LogRecord

BLOCKS = "▁▂▃▄▅▆▇█"
MEMORY = 0.9
"""Decay of the exponential moving average of the loss."""


def sparkline(values: Sequence[float], width: int) -> str:
    """Draws numbers as blocks from ▁ (least) to █ (largest), at most `width` of them.

    Longer sequences are averaged in pieces. A value that is not finite becomes a space; if all
    values are equal, they become ▄.
    """
    count = min(len(values), at_least_one("width", width))
    edges = [len(values) * i // count for i in range(count + 1)] if count else []
    heights = [_mean(values[a:b]) for a, b in pairwise(edges)]
    finite = [height for height in heights if not math.isnan(height)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    return "".join(_block(height, low, high) for height in heights)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(value / len(finite) for value in finite) if finite else math.nan


def _block(height: float, low: float, high: float) -> str:
    if math.isnan(height):
        return " "
    span = high / 2 - low / 2  # high - low could overflow
    if not span:
        return BLOCKS[3]
    return BLOCKS[min(int((height / 2 - low / 2) / span * len(BLOCKS)), len(BLOCKS) - 1)]


def smoothed(values: Sequence[float]) -> Iterator[float]:
    """Yields the exponential moving average, corrected for its start; NaN is ignored."""
    total = weight = 0.0
    for value in values:
        if math.isfinite(value):
            total = MEMORY * total + (1 - MEMORY) * value
            weight = MEMORY * weight + (1 - MEMORY)
        yield total / weight if weight else math.nan


def draw_curve(log: Sequence[LogRecord], path: Path, name: str = "") -> None:
    """Draws losses and learning rate over steps as a PNG file at `path`.

    `log` comes from `read_log`; `name` is the title, if it is ASCII, as matplotlib's font may lack
    other letters. Errors as `check_chart_path`; InvalidArgumentError if the log has no training
    step.
    """
    check_chart_path(path)
    trained = [record.event for record in log if isinstance(record.event, Trained)]
    validated = [record.event for record in log if isinstance(record.event, Validated)]
    if not trained:
        raise InvalidArgumentError(f"{path}: not drawn; the log holds no step of training yet")
    with chart(path, figsize=(9, 5)) as (_, axes):
        _draw_rates(axes.twinx(), trained)
        _draw_losses(axes, trained, validated)
        if name.isascii() and name.isprintable():
            axes.set_title(name, parse_math=False)  # a folder's name may hold dollar signs


def _draw_losses(axes: Any, trained: Sequence[Trained], validated: Sequence[Validated]) -> None:
    steps, losses = [event.step for event in trained], [event.loss for event in trained]
    marker = "." if len(steps) < 30 else ""
    axes.plot(steps, losses, color="C0", alpha=0.35, marker=marker, label="training")
    axes.plot(steps, list(smoothed(losses)), color="C0", label="training, smoothed")
    if validated:
        points = [event.step for event in validated], [event.loss for event in validated]
        axes.plot(*points, color="C1", marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)


def _draw_rates(axes: Any, trained: Sequence[Trained]) -> None:
    rates = [event.learning_rate for event in trained]
    axes.plot([event.step for event in trained], rates, color="0.6", linestyle=":", linewidth=1)
    axes.set_ylabel("learning rate (dotted)", color="0.4")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
