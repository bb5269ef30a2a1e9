"""Files that appear when they are whole, and what it is called when they cannot be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DownloadError


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


@contextmanager
def named_errors(path: Path, advice: str) -> Iterator[None]:
    """Raises DownloadError, with `advice`, for whatever the system or MLX says of a full disk, or
    of one that may not be written to."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "[write]" not in str(error):
            raise  # MLX's word for a disk that is full
        full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        room = "free some space, or " if full else ""
        raise DownloadError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); {room}"
            f"{advice}"
        ) from None
