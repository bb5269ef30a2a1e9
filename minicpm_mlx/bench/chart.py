"""Draws measurements: throughput over context, and over the number of streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import InvalidArgumentError
from ..files.plots import chart, check_chart_path
from .output import Row


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws the throughput in `rows` as a PNG file; errors as `check_chart_path`.

    Leaves out first tokens, which are seconds, and quotations, whose speed depends on the text.
    InvalidArgumentError where nothing else was measured.
    """
    check_chart_path(path)
    rows = [row for row in rows if not row["first_token"] and not row["copy"]]
    if not rows:
        raise InvalidArgumentError(f"{path}: not drawn; a chart needs pp, tg or pg tests")
    with chart(path, 1, 2, figsize=(10, 4)) as (figure, (left, right)):
        for axes, key, fixed, label in (
            (left, "n_depth", "n_parallel", "tokens of context before"),
            (right, "n_parallel", "n_depth", "streams at once"),
        ):
            least = min(row[fixed] for row in rows)
            for kind in sorted({(row["n_prompt"], row["n_gen"]) for row in rows}):
                line = [
                    r for r in rows if (r["n_prompt"], r["n_gen"]) == kind and r[fixed] == least
                ]
                line.sort(key=lambda row: row[key])
                name = "+".join(f"{n}{c}" for n, c in zip(("pp", "tg"), kind, strict=True) if c)
                x, y = [row[key] for row in line], [row["avg_ts"] for row in line]
                axes.errorbar(x, y, [row["stddev_ts"] for row in line], marker="o", label=name)
            axes.set(xlabel=label, ylabel="tokens/s", ylim=(0, None))
            axes.legend()
        # Without it, dollar signs in a folder's name would start a formula.
        figure.suptitle(f"{rows[0]['model']} · {rows[0]['chip']}", parse_math=False)
