"""Which files hold the training, validation and test data, and what their bytes are."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ...errors import DataError
from ...files.rows import KINDS, kind_of, listed

SPLITS = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test",),
}
"""What each part's file is called in a folder, without its ending."""


def split_files(path: str | Path) -> dict[str, Path]:
    """The files of each part, "train", "valid" and "test", of which only train must be there.

    A file is all training data; in a folder the names tell. Raises DataError where there is no
    training file, or two for one part.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            return {"train": _known(path)}
        there = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    found: dict[str, Path] = {}
    for split, names in SPLITS.items():
        files = [file for file in there if file.stem.lower() in names and kind_of(file)]
        if len(files) > 1:
            both = " and ".join(file.name for file in files[:2])
            raise DataError(f"{path}: expected one file for {split}, found {both}; remove one")
        if files:
            found[split] = files[0]
    if "train" not in found:
        raise DataError(
            f"{path}: expected a file train{' or train'.join(KINDS)}, "
            f"found {listed(file.name for file in there) or 'no file'}; "
            "rename it, or give the file itself"
        )
    return found


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    return digest.hexdigest()


def _known(path: Path) -> Path:
    """`path`, if it is a file of a kind that can be read."""
    path.stat()  # a missing file is missing first, whatever its ending
    if not kind_of(path):
        raise DataError(
            f"{path}: expected a file ending in {', '.join(KINDS)}, "
            f"found {path.suffix or 'no ending'}; convert or rename it"
        )
    return path
