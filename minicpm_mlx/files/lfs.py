"""Git LFS pointers: the small text files that stand for large ones in a clone made without LFS."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

BEGIN = b"version https://git-lfs"

FOUND = "a Git LFS pointer, not the file itself; run git lfs pull in its folder"
"""What was found, and what to do, for messages."""


def is_pointer(path: Path) -> bool:
    """Whether the file is a pointer; False where it cannot be read."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(BEGIN)) == BEGIN
    return False
