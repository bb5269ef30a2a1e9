"""Draws a report: each task's score with its interval, beside the published score."""

from __future__ import annotations

import warnings
from pathlib import Path

from ...errors import InvalidArgumentError
from ...files.atomic import named_errors, write_whole
from ...files.plots import check_chart_path
from .summary import Report


def draw_scores(report: Report, path: Path) -> None:
    """Draws the tasks' scores as a PNG file; errors as `check_chart_path`.

    InvalidArgumentError where no question is scored yet.
    """
    check_chart_path(path)
    if not report.tasks:
        raise InvalidArgumentError(f"{path}: not drawn; nothing is scored yet")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(report.tasks)
    figure, axes = pyplot.subplots(figsize=(max(4, 1.5 + 0.9 * count), 4), layout="constrained")
    try:
        scores = [task.part.score for task in report.tasks]
        below = [score.mean - score.low for score in scores]
        above = [score.high - score.mean for score in scores]
        name = str(report.model["name"]).replace("$", r"\$").lstrip("_")
        axes.bar(
            [index - 0.2 for index in range(count)],
            [score.mean for score in scores],
            0.4,
            yerr=[below, above],
            capsize=3,
            label=name or "model",
        )
        published = [(i, task.published) for i, task in enumerate(report.tasks) if task.published]
        axes.bar(
            [index + 0.2 for index, _ in published],
            [figure.value for _, figure in published],
            0.4,
            label=f"{report.beside}, README",
        )
        titles = [task.title + "*" * (task.counted == "ppl") for task in report.tasks]
        axes.set_xticks(range(count), titles, rotation=45, ha="right")
        axes.set(ylabel="score, %", ylim=(0, 100))
        figure.legend(loc="outside upper right", ncols=2)
        with warnings.catch_warnings(), named_errors(path, "give another folder"):
            # matplotlib's own font lacks Chinese, which a folder's name may be in.
            warnings.filterwarnings("ignore", "Glyph .* missing")
            write_whole(path, lambda part: figure.savefig(part, format="png", dpi=120))
    finally:
        pyplot.close(figure)
