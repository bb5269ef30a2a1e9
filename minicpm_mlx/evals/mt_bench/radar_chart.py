"""Draws MT-Bench's radar chart: a model's mean rating in each category."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from ...errors import InvalidArgumentError
from ...files.plots import chart, check_chart_path
from .questions import CATEGORIES
from .run import BenchScores


def draw_radar(models: Mapping[str, BenchScores], path: Path) -> None:
    """Draws the categories' mean ratings of one or more models as a PNG file.

    A category without a rating is drawn at 0. Errors as `check_chart_path`; InvalidArgumentError
    where no model has a rating.
    """
    check_chart_path(path)
    rated = {name: scores for name, scores in models.items() if scores.rated}
    if not rated:
        raise InvalidArgumentError(f"{path}: not drawn; no answer has a rating yet")
    angles = [2 * math.pi * index / len(CATEGORIES) for index in range(len(CATEGORIES))]
    with chart(path, figsize=(7, 6), subplot_kw={"projection": "polar"}) as (_, axes):
        for name, scores in rated.items():
            ratings = [scores.categories[category] or 0.0 for category in CATEGORIES]
            # matplotlib reads dollar signs as formulas, and hides names that begin with _.
            label = name.replace("$", r"\$").lstrip("_") if name.isascii() else "model"
            axes.plot([*angles, 0], [*ratings, ratings[0]], marker=".", label=label)
            axes.fill(angles, ratings, alpha=0.1)
        axes.set_xticks(angles, CATEGORIES)
        axes.tick_params("x", pad=14)
        axes.set_ylim(0, 10)
        axes.legend(loc="lower right", bbox_to_anchor=(1.25, -0.1))
