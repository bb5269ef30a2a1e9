"""Checks made before a chart is drawn."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from ..errors import InvalidArgumentError, MissingPackageError


def check_chart_path(path: Path) -> None:
    """Find out before minutes are spent on measuring whether a chart could be written to `path`.

    MissingPackageError without matplotlib; InvalidArgumentError where no file can be.
    """
    if find_spec("matplotlib") is None:
        raise MissingPackageError("a chart needs matplotlib: pip install 'minicpm-mlx[plot]'")
    written = path if path.exists() else path.parent
    if path.is_dir() or not written.exists() or not os.access(written, os.W_OK):
        raise InvalidArgumentError(
            f"{path}: no chart can be written there; give a file in a folder that exists and can "
            "be written to"
        )
