"""Draws charts with matplotlib, and checks beforehand that they can be written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import InvalidArgumentError, MissingPackageError
from .atomic import named_errors, write_whole


def check_chart_path(path: Path) -> None:
    """Find out before minutes are spent on measuring whether a chart could be written to `path`.

    MissingPackageError without matplotlib; InvalidArgumentError where no file can be.
    """
    if find_spec("matplotlib") is None:
        raise MissingPackageError("a chart needs matplotlib: pip install 'minicpm-mlx[plot]'")
    if path.suffix.lower() not in ("", ".png"):
        raise InvalidArgumentError(f"{path}: a chart is a PNG file; give a name ending in .png")
    written = path if path.exists() else path.parent
    if path.is_dir() or not written.exists() or not os.access(written, os.W_OK):
        raise InvalidArgumentError(
            f"{path}: no chart can be written there; give a file in a folder that exists and can "
            "be written to"
        )


@contextmanager
def chart(path: Path, *shape: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, as of `pyplot.subplots`, written to `path` as PNG after the block."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*shape, layout="constrained", **options)
    try:
        yield figure, axes
        with warnings.catch_warnings(), named_errors(path, "give another place"):
            # matplotlib's own font lacks Chinese, which a name may be in.
            warnings.filterwarnings("ignore", "Glyph .* missing")
            write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=120))
    finally:
        pyplot.close(figure)
