"""Draws a report: each task's score with its interval, beside its published score."""

from __future__ import annotations

from pathlib import Path

from ...errors import InvalidArgumentError
from ...files.plots import chart, check_chart_path
from .summary import Report


def draw_scores(report: Report, path: Path) -> None:
    """Draws the tasks' scores as a PNG file; errors as `check_chart_path`.

    InvalidArgumentError where no question is scored yet.
    """
    check_chart_path(path)
    if not report.tasks:
        raise InvalidArgumentError(f"{path}: not drawn; nothing is scored yet")
    count = len(report.tasks)
    with chart(path, figsize=(max(4, 1.5 + 0.9 * count), 4)) as (figure, axes):
        scores = [task.part.score for task in report.tasks]
        below = [score.mean - score.low for score in scores]
        above = [score.high - score.mean for score in scores]
        name = report.title.replace("$", r"\$").lstrip("_")
        shift = 0.0 if report.beside is None else 0.2
        axes.bar(
            [index - shift for index in range(count)],
            [score.mean for score in scores],
            0.4,
            yerr=[below, above],
            capsize=3,
            label=name or "model",
        )
        published = [(i, task.published) for i, task in enumerate(report.tasks) if task.published]
        if report.beside is not None:
            axes.bar(
                [index + shift for index, _ in published],
                [score.value for _, score in published],
                0.4,
                label=f"{report.beside}, README",
            )
        titles = [task.title + "*" * (task.counted == "ppl") for task in report.tasks]
        axes.set_xticks(range(count), titles, rotation=45, ha="right")
        axes.set(ylabel="score, %", ylim=(0, 100))
        figure.legend(loc="outside upper right", ncols=2)
