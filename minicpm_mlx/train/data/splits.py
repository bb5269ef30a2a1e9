"""Which files hold the training, validation and test data, and what their bytes are."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError
from ...files.rows import KINDS, kind_of, listed
from ...text.tokenizer import Tokenizer
from .counts import DataPart, Entry
from .encoding import Encoded
from .samples import Sample

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


def _known(path: Path) -> Path:
    """`path`, if it is a file of a kind that can be read."""
    path.stat()  # a missing file is missing first, whatever its ending
    if not kind_of(path):
        raise DataError(
            f"{path}: expected a file ending in {', '.join(KINDS)}, "
            f"found {path.suffix or 'no ending'}; convert or rename it"
        )
    return path


FEWEST = 10
"""With fewer samples than this none are kept from training to validate on."""


MOST = 200
"""At most so many are: more would cost time at each validation and tell little."""


@dataclass(frozen=True)
class Held:
    """Training data in two parts."""

    train: DataPart
    valid: DataPart


def hold_out(train: DataPart, fraction: float, seed: int, tokenizer: Tokenizer) -> Held | None:
    """Some rows kept from training, the same for the same seed; of a few long texts, pieces.

    None where there are too few to share.
    """
    entries = train.entries
    if len(entries) < FEWEST and isinstance(entries[0].prompt, str):
        entries = [piece for entry in entries for piece in _pieces(entry, tokenizer)]
    usable = [i for i, entry in enumerate(entries) if entry.encoded.items]
    if len(usable) < FEWEST:
        return None
    count = max(1, min(MOST, len(usable) // 2, round(len(usable) * fraction)))
    chosen = set(random.Random(seed).sample(usable, count))
    kept = [entry for i, entry in enumerate(entries) if i not in chosen]
    return Held(DataPart(kept, train.bad), DataPart([entries[i] for i in sorted(chosen)]))


def _pieces(entry: Entry, tokenizer: Tokenizer) -> list[Entry]:
    """A text's pieces, each by itself."""
    found = []
    for item in entry.encoded.items:
        assert isinstance(item, Sample)
        alone = Encoded([item], split=entry.encoded.split, length=len(item.ids))
        found.append(Entry(entry.place, alone, tokenizer.decode(item.ids[:24])))
    return found
