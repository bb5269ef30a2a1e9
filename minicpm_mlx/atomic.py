"""Files that appear when they are whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a file that takes the place of `path` when it is whole, and on the disk.

    The file has the same ending. What is half written when the process is killed stays beside it,
    under a name that is used again.
    """
    part = path.with_name(f"part-{path.name}")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
