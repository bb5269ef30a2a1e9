"""The curve of a run: a line of text while it goes on, a chart of its log afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...arguments import at_least_one
from ...errors import InvalidArgumentError
from ...files.atomic import named_errors, write_whole
from ...files.plots import check_chart_path
from .events import Trained, Validated
from .jsonl_log import ADVICE, LogRecord

BLOCKS = "▁▂▃▄▅▆▇█"
MEMORY = 0.9
"""Of the smoothed loss: how much of it a new measurement leaves as it was."""


def sparkline(values: Sequence[float], width: int) -> str:
    """Numbers as blocks from ▁ (the least) to █ (the largest), at most `width` of them.

    Longer sequences are averaged piece by piece. A space stands for what is not finite, and ▄ for
    all where there is one value alone.
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
    span = high / 2 - low / 2  # halves, so that it stays finite
    if not span:
        return BLOCKS[3]
    return BLOCKS[min(int((height / 2 - low / 2) / span * len(BLOCKS)), len(BLOCKS) - 1)]


def smoothed(values: Sequence[float]) -> Iterator[float]:
    """Each value's running mean, in which older ones count less and less; NaN leaves it be."""
    total = weight = 0.0
    for value in values:
        if math.isfinite(value):
            total = MEMORY * total + (1 - MEMORY) * value
            weight = MEMORY * weight + (1 - MEMORY)
        yield total / weight if weight else math.nan


def draw_curve(log: Sequence[LogRecord], path: Path, name: str = "") -> None:
    """Draw losses and learning rate against steps as a PNG file at `path`, whole or not at all.

    `log` is what `read_log` returns; `name` is the title, where matplotlib's font has its letters.
    Errors as `check_chart_path`, which tells them before a run; InvalidArgumentError where the
    log holds no step of training.
    """
    check_chart_path(path)
    trained = [record.event for record in log if isinstance(record.event, Trained)]
    validated = [record.event for record in log if isinstance(record.event, Validated)]
    if not trained:
        raise InvalidArgumentError(f"{path}: not drawn; the log holds no step of training yet")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    try:
        _draw_rates(axes.twinx(), trained)
        _draw_losses(axes, trained, validated)
        if name.isascii() and name.isprintable():
            axes.set_title(name, parse_math=False)  # a folder's name may hold dollar signs
        with named_errors(path, ADVICE):
            write_whole(path, lambda part: figure.savefig(part, format="png", dpi=120))
    finally:
        pyplot.close(figure)


def _draw_losses(axes: Any, trained: Sequence[Trained], validated: Sequence[Validated]) -> None:
    steps, losses = [event.step for event in trained], [event.loss for event in trained]
    few = len(steps) < 30
    axes.plot(steps, losses, color="C0", alpha=0.35, marker="." if few else "", label="training")
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
