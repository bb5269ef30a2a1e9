"""Chooses the files that hold a model's weights, by one rule for folders and repositories.

The order is transformers': safetensors before .bin, a whole file before shards. An index beside a
whole file, or one that names shards which were replaced by a complete set, is out of date and does
not count. Names alone decide, and the index where one is needed; nothing imports MLX.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import count
from pathlib import Path

STEMS = {"safetensors": "model", "bin": "pytorch_model"}
"""File endings in order of preference, and the usual stem of each."""


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """One set of weight files that are there."""

    files: tuple[str, ...]
    """Names, sorted."""
    index: str | None = None
    """Name of the index of shards; None for a whole file, and where there is none."""
    tensors: tuple[str, ...] = ()
    """Names of the tensors that the index lists."""
    missing: str | None = None
    """The first file that the index or the numbering calls for and that is not there."""


def choose_weight_files(
    names: Collection[str], read_index: Callable[[str], str]
) -> WeightFiles | None:
    """The files to read of those called `names`; an incomplete set only if there is no other.

    `read_index` returns the text of the index with a name. Raises ValueError for a malformed one.
    """
    incomplete = None
    for ending, stem in STEMS.items():
        found = _of_format(set(names), stem, ending, read_index)
        if found and found.missing is None:
            return found
        incomplete = incomplete or found
    return incomplete


def files_in(folder: Path) -> WeightFiles | None:
    """The weight files of a folder. A link to a file that is not there does not count."""
    names = [path.name for path in folder.iterdir() if path.exists()]
    return choose_weight_files(names, lambda name: (folder / name).read_text(encoding="utf-8"))


def _of_format(
    names: set[str], stem: str, ending: str, read_index: Callable[[str], str]
) -> WeightFiles | None:
    if (whole := f"{stem}.{ending}") in names:
        return WeightFiles(files=(whole,))
    index: str | None = f"{stem}.{ending}.index.json"
    where = _parsed(index, ending, read_index) if index in names else {}
    named = set(where.values())
    index, tensors = index if where else None, tuple(where)
    numbered = defaultdict(set)  # by the text after the number, "-of-00002.safetensors"
    for name in names:
        if match := re.fullmatch(rf"{stem}-\d+(-of-(\d+)\.{ending})", name):
            numbered[int(match[2]), match[1]].add(name)
    complete = [files for (total, _), files in sorted(numbered.items()) if len(files) == total]
    older = {name for name in names if re.fullmatch(rf"weights\..*\.{ending}", name)}  # mlx-lm's
    # The index chooses between sets that are there, and does not matter where it fits none.
    sets = [files for files in complete if named <= files]
    sets += [named] if named <= names else []
    for files in (*sets, *complete, older):
        if files:
            return WeightFiles(files=tuple(sorted(files)), index=index, tensors=tensors)
    missing = min(named - names, default=None)
    for _, rest in sorted(numbered):
        missing = missing or next(
            name for number in count(1) if (name := f"{stem}-{number:05d}{rest}") not in names
        )
    here = (named & names).union(*numbered.values())
    return (
        WeightFiles(files=tuple(sorted(here)), index=index, tensors=tensors, missing=missing)
        if missing
        else None
    )


def _parsed(index: str, ending: str, read: Callable[[str], str]) -> dict[str, str]:
    """An index's map from tensor to file; ValueError where it is none."""
    try:
        where = {
            str(name): str(file) for name, file in json.loads(read(index))["weight_map"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f'{index}: expected {{"weight_map": {{tensor: file}}}}; download it again'
        ) from None
    for file in where.values():
        if Path(file).name != file or not file.endswith(f".{ending}"):
            raise ValueError(f"{index}: {file!r} is not the name of a .{ending} file beside it")
    return where
