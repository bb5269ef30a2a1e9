"""The folder of a run: what it was asked for, and a line for each question that is done.

    settings.json             the model, the program, and of each part its settings and data
    records/mmlu.gen.jsonl    each prompt, reply, what was read of it, and score

A run that was broken off, at whatever point, goes on from there.
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

__all__ = ["Key", "Record", "RunRecord", "opened"]

FORMAT = 1
SETTINGS = "settings.json"
RECORDS = "records"
NO_MATTER = ("origin", "sandbox")
"""What may be otherwise when a run goes on: where the data lay, what held programs."""
ADVICE = "give another folder"

Key = tuple[str, str]
"""Subset and id of a question."""
Record = Mapping[str, Any]


@dataclass
class RunRecord:
    """What a folder holds."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    """model, program, parts; empty where nothing was begun."""

    @classmethod
    def read(cls, folder: str | Path) -> RunRecord:
        """A folder as it is; DataError where it holds no run, or a damaged one."""
        run = cls(Path(folder))
        path = run.folder / SETTINGS
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(
                f"{path}: expected the settings of a run ({error.strerror or error}); "
                "give the folder that --output named"
            ) from None
        except ValueError:
            found = None
        parts = found.get("parts") if isinstance(found, dict) else None
        if not isinstance(parts, dict) or not all(
            isinstance(part, dict) for part in parts.values()
        ):
            raise DataError(f"{path}: expected the settings of a run, found another file; {ADVICE}")
        if found.get("format") != FORMAT:
            raise DataError(f"{path}: was written by another version of minicpm-mlx; {ADVICE}")
        run.settings = found
        return run

    @property
    def model(self) -> str:
        """What was run, for people: the model, with its adapter."""
        model = self.settings["model"]
        return str(model["name"]) + (f" with {model['adapter']}" if model.get("adapter") else "")

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """By name, such as "mmlu.gen"."""
        found: dict[str, dict[str, Any]] = self.settings["parts"]
        return found

    def begin(
        self, model: Mapping[str, Any], program: Mapping[str, Any], parts: Mapping[str, Any]
    ) -> None:
        """Note what is going to be done, if nothing that is there was done otherwise.

        InvalidArgumentError names what differs.
        """
        if not self.settings:
            self.settings = {"format": FORMAT, "model": dict(model), "program": dict(program)}
            self.settings["parts"] = {}
        self._check_model(self.settings["model"], model)
        known = {"version": self.settings["program"]["minicpm-mlx"]}
        check_same(self.folder, "minicpm-mlx's", known, {"version": program["minicpm-mlx"]})
        for name, part in parts.items():
            if name in self.parts:
                check_same(self.folder, f"{name}'s", self.parts[name], part)
        self.parts.update(parts)
        with named_errors(self.folder, ADVICE):
            (self.folder / RECORDS).mkdir(exist_ok=True)
            write_json(self.folder / SETTINGS, self.settings)

    def _check_model(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        if before["identity"] != now["identity"]:
            check_same(self.folder, "the model's", before, now)

    def lines(self, part: str) -> JsonlFile:
        """The file of a part's records."""
        return JsonlFile(self.folder / RECORDS / f"{part}.jsonl")

    def records(self, part: str) -> dict[Key, Record]:
        """A part's records by question, in the order in which they came."""
        path = self.folder / RECORDS / f"{part}.jsonl"
        return keyed(JsonlFile(path).rows) if path.exists() else {}


def check_same(folder: Path, whose: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """InvalidArgumentError that names what differs, where a run would go on otherwise."""
    for name in dict.fromkeys((*now, *before)):  # what was asked for before what follows from it
        if name not in NO_MATTER and before.get(name) != now.get(name):
            raise InvalidArgumentError(
                f"{folder} has a run in which {whose} {_difference(name, before, now)}; "
                "go on with the same, or give another folder"
            )


def keyed(rows: tuple[Row, ...]) -> dict[Key, Record]:
    """Records by question; DataError for one without question or score."""
    found: dict[Key, Record] = {}
    for row in rows:
        score = row.value.get("score")
        if not isinstance(score, int | float):
            raise DataError(f"{row.place}: expected a record with a score; remove the line")
        found.setdefault((text(row, "subset"), text(row, "id")), row.value)
    return found


@contextmanager
def opened(folder: str | Path) -> Iterator[RunRecord]:
    """The run in `folder`, which is made if need be, for one process at a time.

    InvalidArgumentError where it holds anything else, StorageError where it cannot be made or
    another process has it.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise InvalidArgumentError(f"{path} is a file; give a folder")
    with named_errors(path, ADVICE):
        path.mkdir(parents=True, exist_ok=True)
    with alone(path, path):
        if (path / SETTINGS).exists():
            yield RunRecord.read(path)
            return
        others = [
            file.name for file in path.iterdir() if file.name not in (RECORDS, f"part-{SETTINGS}")
        ]
        if others or any((path / RECORDS).glob("*")):
            raise InvalidArgumentError(
                f"{path} holds {(others or [RECORDS])[0]} and no run to go on with; {ADVICE}"
            )
        yield RunRecord(path)


def write_json(path: Path, value: object) -> None:
    """A JSON file that is there whole or not at all."""
    content = json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    write_text(path, content)


def write_text(path: Path, content: str) -> None:
    """A text file that is there whole or not at all; halves of surrogate pairs become "?"."""
    with named_errors(path, ADVICE):
        write_whole(path, lambda part: part.write_bytes(content.encode(errors="replace")))


def _difference(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = before.get(name), now.get(name)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        inner = next(key for key in sorted({*old, *new}) if old.get(key) != new.get(key))
        name, old, new = f"{name} of {inner}", old.get(inner), new.get(inner)
    return f"{name} is {_short(old)}, not {_short(new)}"


def _short(value: object) -> str:
    said = json.dumps(value, ensure_ascii=False)
    return said if len(said) <= 80 else f"{said[:79]}…"
