"""Loads a task's data from a folder in any published layout, or from the hub.

Files are found by name. A set with subjects may have one file for each subject, or one for all
with a field for the subject. Rows keep the order of their files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...errors import DataError, DownloadError, ModelNotFoundError
from ...files.atomic import sha256
from ...files.rows import Row, listed
from ...loading import download as hub
from ..question import Doc
from ..task import DocFilter, Source, Task
from .fields import text
from .layouts import rows

PARQUET = "refs/convert/parquet"
"""The hub's branch with every data set as configuration/split/0000.parquet, also of sets that were
published as a script or an archive."""

Docs = dict[str, tuple[Doc, ...]]
"""By subset."""


@dataclass(frozen=True, kw_only=True)
class EvalData:
    """The data of one task."""

    docs: Mapping[str, tuple[Doc, ...]]
    """The documents to ask by subset, in the official order."""
    examples: Mapping[str, tuple[Doc, ...]]
    """Few-shot examples by subset; a subset without any draws them from its `docs`."""
    sha256: Mapping[str, str]
    """Of every file read, by its path under `origin`."""
    origin: str
    """The folder, or repository and revision."""
    notes: tuple[str, ...] = ()
    """Remarks for readers of the score: rows dropped, subsets missing."""


@dataclass
class _DataFolder:
    """Reads files under a folder; keeps their hashes and counts dropped rows."""

    path: Path
    source: Source
    sha256: dict[str, str] = field(default_factory=dict)
    dropped: int = 0

    def find(self, patterns: Sequence[str]) -> dict[str, list[Path]]:
        """Files of the first pattern that has any, by subset; "" for one file for all."""
        for pattern in patterns:
            files = {
                subset: sorted(self.path.glob(pattern.replace("{subset}", subset)), key=_file_order)
                for subset in _subsets_of(pattern, self.source)
            }
            if files := {subset: paths for subset, paths in files.items() if paths}:
                return files
        return {}

    def rows(self, patterns: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """Rows of these files, each with its subset."""
        for subset, paths in self.find(patterns).items():
            for path in paths:
                self.sha256[path.relative_to(self.path).as_posix()] = sha256(path)
                for row in rows(path, self.source.columns):
                    yield subset or self._row_subset(row), row

    def docs(self, patterns: Sequence[str], is_used: DocFilter | None = None) -> Docs:
        """The documents of these files by subset, in the official order of the subsets."""
        source = self.source
        docs: dict[str, dict[str, Doc]] = {subset: {} for subset in source.subsets}
        for subset, row in self.rows(patterns):
            fields = source.parse_row(row)
            if fields is None:
                self.dropped += 1
            elif is_used is None or is_used(fields):
                known = docs[subset]
                index = str(len(known))
                name = text(row, source.id_field) if source.id_field in row.value else index
                key = f"{name}#{index}" if name in known else name
                known[key] = Doc(id=key, subset=subset, fields=fields)
        return {subset: tuple(known.values()) for subset, known in docs.items() if known}

    def _row_subset(self, row: Row) -> str:
        field_name, subsets = self.source.subset_field, self.source.subsets
        if not field_name:
            return ""
        name = {name.lower(): content for name, content in row.value.items()}.get(field_name)
        if name is None and "" in subsets:
            return ""
        subset = str(name).lower().replace("&", "and").replace(" ", "_").replace("-", "_")
        if subset not in subsets:
            raise DataError(
                f"{row.place}: expected one of {listed(subsets)} in {field_name!r}, found "
                f"{str(name)[:40]!r}; is this the set's own file?"
            )
        return subset


def load(task: Task, folder: str | Path | None = None, *, progress: bool = True) -> EvalData:
    """The questions of `task` and its examples, from a folder or, without one, from the hub.

    The folder holds the set in a published layout, or has a subfolder of the task's name that
    does. `progress` shows a download on stderr. Raises DataError with file and line for data that
    is missing or malformed, DownloadError or ModelNotFoundError where the hub does not provide it,
    and MissingPackageError for .parquet without pyarrow.
    """
    source = task.source
    if folder is not None:
        root = _task_folder(task, Path(folder))
        origin = str(root)
    elif source.cot_prompts:
        raise DataError(
            f"{task.title} needs files that are not on the hub ({', '.join(source.cot_prompts)}): "
            f"expected a folder with them, got none; {_advice(task)}"
        )
    else:
        root = _downloaded(task, progress)
        origin = f"{source.repo}@{root.name}"
    reader = _DataFolder(root, source)
    docs = reader.docs(source.questions)
    dropped = reader.dropped
    if not docs and not reader.sha256:
        raise _missing_files(task, root, source.questions)
    if not docs:
        raise DataError(
            f"{root}: expected questions in {listed(sorted(reader.sha256))}, found none"
            + f" that can be asked ({dropped} dropped)" * (dropped > 0)
            + f"; {_advice(task)}"
        )
    if source.cot_prompts:
        docs = _with_cot_prompts(task, reader, docs)
    examples = reader.docs(source.examples, source.is_example)
    notes = _notes(task, docs, dropped)
    return EvalData(docs=docs, examples=examples, sha256=reader.sha256, origin=origin, notes=notes)


def _downloaded(task: Task, progress: bool) -> Path:
    source = task.source
    try:
        return hub.fetch_data(source.repo, _hub_files(source), PARQUET, progress=progress)
    except (DownloadError, ModelNotFoundError) as error:
        raise type(error)(
            f"{error}. Or {_advice(task)} another way and give their folder: --data FOLDER (data=)"
        ) from None


def _task_folder(task: Task, folder: Path) -> Path:
    if not folder.is_dir():
        raise DataError(
            f"{folder}: expected a folder with {task.title}'s files, found none; {_advice(task)}"
        )
    own = folder / task.name
    return own if own.is_dir() else folder


def _hub_files(source: Source) -> list[str]:
    return [
        pattern.replace("{subset}", subset)
        for pattern in source.download
        for subset in _subsets_of(pattern, source)
    ]


def _subsets_of(pattern: str, source: Source) -> Sequence[str]:
    """Subsets that have a file of this pattern each; "" where one file is for all."""
    return [subset for subset in source.subsets if subset] if "{subset}" in pattern else [""]


def _with_cot_prompts(task: Task, reader: _DataFolder, docs: Docs) -> Docs:
    patterns = task.source.cot_prompts
    prompts = {subset: text(row, "text", "cot_prompt") for subset, row in reader.rows(patterns)}
    if missing := [subset for subset in docs if subset not in prompts]:
        raise _missing_files(task, reader.path, patterns, f" for {listed(missing)}")
    return {
        subset: tuple(
            replace(doc, fields={**doc.fields, "cot": prompts[subset]}) for doc in docs[subset]
        )
        for subset in docs
    }


def _notes(task: Task, docs: Docs, dropped: int) -> tuple[str, ...]:
    notes = []
    if dropped:
        notes.append(f"{dropped} rows were dropped, as they cannot be asked with distinct options")
    expected = [subset for subset in task.source.subsets if subset]
    if missing := [subset for subset in expected if subset not in docs and "" not in docs]:
        notes.append(
            f"{len(expected) - len(missing)} of {len(expected)} subsets are there; "
            f"missing: {listed(missing)}"
        )
    return tuple(notes)


def _missing_files(task: Task, folder: Path, patterns: Sequence[str], of: str = "") -> DataError:
    present = listed(sorted(file.name for file in folder.iterdir()))
    expected = " or ".join(patterns).replace("{subset}", task.source.subset_field.upper())
    return DataError(
        f"{folder}: expected {task.title}'s files ({expected}){of}, "
        f"found {present or 'nothing'}; {_advice(task)}"
    )


def _advice(task: Task) -> str:
    address = task.source.advice or f"huggingface.co/datasets/{task.source.repo}"
    return f"download them from {address}"


def _file_order(path: Path) -> tuple[str, int, str]:
    """Sorts 1.json, 2.json, …, 10.json by their numbers."""
    return (str(path.parent), int(path.stem) if path.stem.isdecimal() else -1, path.name)
