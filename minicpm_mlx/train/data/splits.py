"""Finds the training, validation and test files, and holds out validation data."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from ...errors import DataError
from ...files.rows import KINDS, kind_of, listed
from ...text.tokenizer import Tokenizer
from .counts import DataSplit, Entry
from .samples import Sample

SPLITS = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test",),
}
"""File names of each split in a folder, without their endings."""

MIN_SAMPLES = 10
"""Data sets with fewer samples have no validation data held out."""

MAX_HELD_OUT = 200
"""More samples would slow down each validation and tell little."""


def split_files(path: str | Path) -> dict[str, Path]:
    """Returns the files of the splits "train", "valid" and "test"; only train is required.

    A single file is training data; in a folder, names decide. Raises DataError if there is no
    training file, or two files for one split.
    """
    path = Path(path)
    try:
        if not path.is_dir():
            return {"train": _check_kind(path)}
        files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    splits: dict[str, Path] = {}
    for split, names in SPLITS.items():
        matches = [file for file in files if file.stem.lower() in names and kind_of(file)]
        if len(matches) > 1:
            both = " and ".join(file.name for file in matches[:2])
            raise DataError(f"{path}: expected one file for {split}, found {both}; remove one")
        if matches:
            splits[split] = matches[0]
    if "train" not in splits:
        raise DataError(
            f"{path}: expected a file train{' or train'.join(KINDS)}, "
            f"found {listed(file.name for file in files) or 'no file'}; "
            "rename it, or give the file itself"
        )
    return splits


def _check_kind(path: Path) -> Path:
    path.stat()  # report a missing file as missing, whatever its ending
    if not kind_of(path):
        raise DataError(
            f"{path}: expected a file ending in {', '.join(KINDS)}, "
            f"found {path.suffix or 'no ending'}; convert or rename it"
        )
    return path


def hold_out(
    train: DataSplit, fraction: float, seed: int, tokenizer: Tokenizer
) -> tuple[DataSplit, DataSplit] | None:
    """Splits training data into training and validation data; the same seed picks the same rows.

    A few long texts are divided by their pieces. Returns None if there are too few samples.
    """
    entries = train.entries
    if len(entries) < MIN_SAMPLES and isinstance(entries[0].prompt, str):
        entries = [piece for entry in entries for piece in _pieces(entry, tokenizer)]
    usable = [i for i, entry in enumerate(entries) if entry.encoded.items]
    if len(usable) < MIN_SAMPLES:
        return None
    count = max(1, min(MAX_HELD_OUT, len(usable) // 2, round(len(usable) * fraction)))
    held_out = set(random.Random(seed).sample(usable, count))
    kept = [entry for i, entry in enumerate(entries) if i not in held_out]
    return DataSplit(kept, train.bad), DataSplit([entries[i] for i in sorted(held_out)])


def _pieces(entry: Entry, tokenizer: Tokenizer) -> list[Entry]:
    """One entry for each piece of a text."""
    pieces = []
    for item in entry.encoded.items:
        assert isinstance(item, Sample)
        encoded = replace(entry.encoded, items=[item], length=len(item.ids))
        pieces.append(Entry(entry.place, encoded, tokenizer.decode(item.ids[:24])))
    return pieces
