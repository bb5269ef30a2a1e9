"""The data of a task: from a folder in any published layout, or from the hub.

Files are looked for by name; those of a set with subjects may be one for each, or one for all with
a field that names the subject. Rows keep the order of their files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import DataError
from ...files.atomic import sha256
from ...files.rows import Row, listed
from ...loading import download as hub
from ..question import Item
from ..task import Keep, Source
from .fields import text
from .layouts import rows

if TYPE_CHECKING:
    from ..task import Task

__all__ = ["Loaded", "Source", "load"]

PARQUET = "refs/convert/parquet"
"""The branch on which the hub keeps every data set in one layout: configuration/split/0000.parquet,
also of those that were published as a script or an archive."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The data of one task."""

    items: Mapping[str, tuple[Item, ...]]
    """The questions by subset, in the official order."""
    shots: Mapping[str, tuple[Item, ...]]
    """Examples by subset; a subset that has none draws them from its questions."""
    sha256: Mapping[str, str]
    """Of every file read, by its name under `origin`."""
    origin: str
    """The folder, or repository and revision."""
    notes: tuple[str, ...] = ()
    """What a reader of the score should know: rows dropped, subsets missing."""


@dataclass
class _Folder:
    """What is read under one folder."""

    path: Path
    source: Source
    sha256: dict[str, str] = field(default_factory=dict)
    dropped: int = 0

    def found(self, names: Sequence[str]) -> dict[str, list[Path]]:
        """Files of the first of `names` that is there, by subset; "" for one file for all."""
        for name in names:
            files = {
                subset: sorted(self.path.glob(name.replace("{subset}", subset)), key=_natural)
                for subset in _for(name, self.source)
            }
            if found := {subset: paths for subset, paths in files.items() if paths}:
                return found
        return {}

    def items(self, names: Sequence[str], keep: Keep | None = None) -> dict[str, tuple[Item, ...]]:
        """The items of these files by subset, in the official order of the subsets."""
        items: dict[str, dict[str, Item]] = {subset: {} for subset in self.source.subsets}
        for subset, paths in self.found(names).items():
            for path in paths:
                for row in self.rows(path):
                    self._add(items, row, subset, keep)
        return {subset: tuple(there.values()) for subset, there in items.items() if there}

    def _add(
        self,
        items: dict[str, dict[str, Item]],
        row: Row,
        subset: str,
        keep: Keep | None,
    ) -> None:
        source = self.source
        if not subset and source.subset_of:
            subset = self.subset(row)
        there = items[subset]
        fields = source.read(row)
        if fields is None:
            self.dropped += 1
        elif keep is None or keep(fields):
            name = text(row, source.name_of) if source.name_of in row.value else str(len(there))
            if name in there:
                name = f"{name}#{len(there)}"
            there[name] = Item(id=name, subset=subset, fields=fields)

    def subset(self, row: Row) -> str:
        """The subset that a row of a file for all names."""
        names = {name.lower(): content for name, content in row.value.items()}
        named = names.get(self.source.subset_of)
        if named is None and "" in self.source.subsets:
            return ""
        subset = str(named).lower().replace("&", "and").replace(" ", "_").replace("-", "_")
        if subset not in self.source.subsets:
            raise DataError(
                f"{row.place}: expected one of {listed(self.source.subsets)} in "
                f"{self.source.subset_of!r}, found {str(named)[:40]!r}; is this the set's own file?"
            )
        return subset

    def texts(self, names: Sequence[str]) -> dict[str, str]:
        """What the files beside the data say for each subset."""
        found: dict[str, str] = {}
        for subset, paths in self.found(names).items():
            for path in paths:
                for row in self.rows(path):
                    found[subset or self.subset(row)] = text(row, "text", "cot_prompt")
        return found

    def rows(self, path: Path) -> list[Row]:
        """The rows of a file, whose hash is noted."""
        self.sha256[path.relative_to(self.path).as_posix()] = sha256(path)
        return rows(path, self.source.columns)


def load(task: Task, folder: str | Path | None = None, *, progress: bool = True) -> Loaded:
    """The questions of `task` and its examples, from a folder or, without one, from the hub.

    The folder holds the set in a published layout, or has a folder of the task's name that does.
    `progress` shows a download on stderr. Raises DataError with file and line for data that is
    missing or malformed, DownloadError or ModelNotFoundError where the hub does not give it, and
    MissingPackageError for .parquet without pyarrow.
    """
    if folder is None and task.source.beside:
        raise DataError(
            f"{task.title} needs files that are not on the hub ({', '.join(task.source.beside)}): "
            f"expected a folder with them, got none; {_advice(task)}"
        )
    if folder is None:
        files = _downloads(task.source)
        root = hub.fetch_data(task.source.repo, files, PARQUET, progress=progress)
        origin = f"{task.source.repo}@{root.name}"
    else:
        root = _root(task, Path(folder))
        origin = str(root)
    reader = _Folder(root, task.source)
    items = reader.items(task.source.items)
    dropped = reader.dropped
    if not items and reader.sha256:
        raise DataError(
            f"{root}: expected questions in {listed(sorted(reader.sha256))}, found none"
            + f" that can be asked ({dropped} dropped)" * (dropped > 0)
            + f"; {_advice(task)}"
        )
    if not items:
        raise _missing(task, root, task.source.items)
    if task.source.beside:
        items = _with_texts(task, reader, items)
    shots = reader.items(task.source.shots, task.source.shot)
    notes = _notes(task, items, dropped)
    return Loaded(items=items, shots=shots, sha256=reader.sha256, origin=origin, notes=notes)


def _root(task: Task, folder: Path) -> Path:
    if not folder.is_dir():
        raise DataError(
            f"{folder}: expected a folder with {task.title}'s files, found none; {_advice(task)}"
        )
    own = folder / task.name
    return own if own.is_dir() else folder


def _downloads(source: Source) -> list[str]:
    return [
        name.replace("{subset}", subset)
        for name in source.download
        for subset in _for(name, source)
    ]


def _for(name: str, source: Source) -> Sequence[str]:
    """The subsets that have a file of this name each; "" where one file is for all."""
    return [subset for subset in source.subsets if subset] if "{subset}" in name else [""]


def _with_texts(
    task: Task, reader: _Folder, items: dict[str, tuple[Item, ...]]
) -> dict[str, tuple[Item, ...]]:
    found = reader.texts(task.source.beside)
    if lacking := [subset for subset in items if subset not in found]:
        raise _missing(task, reader.path, task.source.beside, f" for {listed(lacking)}")
    return {
        subset: tuple(
            Item(id=item.id, subset=subset, fields={**item.fields, "cot": found[subset]})
            for item in there
        )
        for subset, there in items.items()
    }


def _notes(task: Task, items: Mapping[str, tuple[Item, ...]], dropped: int) -> tuple[str, ...]:
    notes = []
    if dropped:
        notes.append(f"{dropped} rows were dropped, as they cannot be asked with distinct options")
    expected = [subset for subset in task.source.subsets if subset]
    if lacking := [subset for subset in expected if subset not in items and "" not in items]:
        notes.append(
            f"{len(expected) - len(lacking)} of {len(expected)} subsets are there; "
            f"missing: {listed(lacking)}"
        )
    return tuple(notes)


def _missing(task: Task, folder: Path, names: Sequence[str], of: str = "") -> DataError:
    there = listed(sorted(file.name for file in folder.iterdir()))
    expected = " or ".join(names).replace("{subset}", (task.source.subset_of or "").upper())
    return DataError(
        f"{folder}: expected {task.title}'s files ({expected}){of}, "
        f"found {there or 'nothing'}; {_advice(task)}"
    )


def _advice(task: Task) -> str:
    where = task.source.advice or f"huggingface.co/datasets/{task.source.repo}"
    return f"download them from {where}"


def _natural(path: Path) -> tuple[str, int, str]:
    """Files 1.json, 2.json, …, 10.json in the order of their numbers."""
    return (str(path.parent), int(path.stem) if path.stem.isdecimal() else -1, path.name)
