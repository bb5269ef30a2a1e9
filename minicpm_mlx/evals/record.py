"""The folder of a run: its settings, and a line for each scored question.

    settings.json             the model, the program's versions, each part's settings and data
    records/mmlu.gen.jsonl    each question's prompt, reply, parsed answer and score

An interrupted run resumes from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError, InvalidArgumentError
from ..files.atomic import alone, named_errors, write_whole
from ..files.jsonl import JsonlFile
from ..files.rows import Row
from .data.fields import text

FORMAT = 1
SETTINGS = "settings.json"
RECORDS = "records"
MAY_DIFFER = ("origin", "sandbox")
"""Settings that may differ when a run resumes: the data's folder, the kind of sandbox."""
ADVICE = "give another folder"

Key = tuple[str, str]
"""Subset and id of a question."""
Record = Mapping[str, Any]


@dataclass
class RunRecord:
    """A run's folder."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    """model, program, parts; empty in a new folder."""

    @classmethod
    def read(cls, folder: str | Path) -> RunRecord:
        """Reads a folder's settings; DataError where it holds no run, or a damaged one."""
        path = Path(folder) / SETTINGS
        if not path.is_file():
            raise DataError(
                f"{path}: expected the settings of a run, found none; give the folder that "
                "--output named"
            )
        return cls(Path(folder), read_settings(path, "parts", "a run"))

    @property
    def model(self) -> str:
        """The model with its adapter, for people."""
        return model_title(self.settings["model"])

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """Settings by part, such as "mmlu.gen"."""
        parts: dict[str, dict[str, Any]] = self.settings["parts"]
        return parts

    def begin(
        self, model: Mapping[str, Any], program: Mapping[str, Any], parts: Mapping[str, Any]
    ) -> None:
        """Records what is going to run; InvalidArgumentError where the folder's run differs."""
        if not self.settings:
            self.settings = {"format": FORMAT, "model": dict(model), "program": dict(program)}
            self.settings["parts"] = {}
        if self.settings["model"]["identity"] != model["identity"]:
            check_same(self.folder, "the model's", self.settings["model"], model)
        self.check_parts(program, parts)
        self.parts.update(parts)
        with named_errors(self.folder, ADVICE):
            (self.folder / RECORDS).mkdir(exist_ok=True)
            write_json(self.folder / SETTINGS, self.settings)

    def check_parts(self, program: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
        """InvalidArgumentError where the folder's run has other settings of a part."""
        if not self.settings:
            return
        before, now = self.settings["program"]["minicpm-mlx"], program["minicpm-mlx"]
        check_same(self.folder, "minicpm-mlx's", {"version": before}, {"version": now})
        for name, part in parts.items():
            if name in self.parts:
                check_same(self.folder, f"{name}'s", self.parts[name], part)

    def open_part(self, part: str) -> JsonlFile:
        return JsonlFile(self.folder / RECORDS / f"{part}.jsonl")

    def records(self, part: str) -> dict[Key, Record]:
        """A part's records by question, in the order of the file."""
        path = self.folder / RECORDS / f"{part}.jsonl"
        return by_question(JsonlFile(path).rows) if path.exists() else {}


def model_title(model: Mapping[str, Any]) -> str:
    """The name of a run's model with its adapter's."""
    return str(model["name"]) + (f" with {model['adapter']}" if model.get("adapter") else "")


def read_settings(path: Path, key: str, of: str) -> dict[str, Any]:
    """A settings file, of which `key` holds an object of objects; DataError for any other file."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; {ADVICE}") from None
    except ValueError:
        settings = None
    entries = settings.get(key) if isinstance(settings, dict) else None
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise DataError(f"{path}: expected the settings of {of}, found another file; {ADVICE}")
    if settings.get("format") != FORMAT:
        raise DataError(f"{path}: was written by another version of minicpm-mlx; {ADVICE}")
    return dict(settings)


def check_same(folder: Path, whose: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """InvalidArgumentError that names the first setting in which a resumed run would differ."""
    for name in dict.fromkeys((*now, *before)):  # settings before what follows from them
        if name not in MAY_DIFFER and before.get(name) != now.get(name):
            raise InvalidArgumentError(
                f"{folder} has a run in which {whose} {_difference(name, before, now)}; "
                "resume it with the same settings, or give another folder"
            )


def by_question(rows: tuple[Row, ...]) -> dict[Key, Record]:
    """Records by question; DataError for one without question or score."""
    records: dict[Key, Record] = {}
    for row in rows:
        score = row.value.get("score")
        if not isinstance(score, int | float):
            raise DataError(f"{row.place}: expected a record with a score; remove the line")
        records.setdefault((text(row, "subset"), text(row, "id")), row.value)
    return records


@contextmanager
def open_run(folder: str | Path) -> Iterator[RunRecord]:
    """The run in `folder`, which is created if need be, for one process at a time.

    InvalidArgumentError where it holds anything else, StorageError where it cannot be created or
    another process has it.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise InvalidArgumentError(f"{path} is a file; give a folder")
    with open_folder(path):
        if (path / SETTINGS).exists():
            yield RunRecord.read(path)
            return
        names = {file.name for file in path.iterdir()}
        others = sorted(names - {RECORDS, f"part-{SETTINGS}"})
        if others or any((path / RECORDS).glob("*")):
            raise InvalidArgumentError(
                f"{path} holds {(others or [RECORDS])[0]} and no run to resume; {ADVICE}"
            )
        yield RunRecord(path)


@contextmanager
def open_folder(path: Path) -> Iterator[None]:
    """Creates a folder and keeps other processes from it; StorageError where either fails."""
    with named_errors(path, ADVICE):
        path.mkdir(parents=True, exist_ok=True)
    with alone(path, path):
        yield


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file as a whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Writes a text file as a whole or not at all; halves of surrogate pairs become "?"."""
    with named_errors(path, ADVICE):
        write_whole(path, lambda part: part.write_bytes(content.encode(errors="replace")))


def _difference(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = before.get(name), now.get(name)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        inner = next(key for key in sorted({*old, *new}) if old.get(key) != new.get(key))
        name, old, new = f"{name} of {inner}", old.get(inner), new.get(inner)
    return f"{name} is {_shorten(old)}, not {_shorten(new)}"


def _shorten(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"
