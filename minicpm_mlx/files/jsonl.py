"""Append-only JSON Lines files, from which an interrupted run continues."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from .atomic import named_errors
from .rows import Row
from .strict_json import StrictJson


class JsonlFile:
    """A file of JSON Lines: its rows, and an append that is on disk when `add` returns.

    A last line that was cut off, as when a process is killed while writing, is no record and is
    removed by the next `add`. DataError for any other line that is not an object, and if `path` is
    not a file or has no folder. One writer at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = 0
        """Size up to the end of the last record, where the next one is added."""
        self._end = b""
        """The newline that the last line lacks."""
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: expected a file, found something else; give another place")
        if not path.parent.is_dir():
            raise DataError(f"{path.parent}: expected a folder to write in, found none; make it")
        self.rows = tuple(self._read()) if path.exists() else ()

    def add(self, record: Mapping[str, Any]) -> None:
        """Append one record. StorageError where the disk is full or may not be written to."""
        # Text of a model may hold halves of surrogate pairs, which only escapes can say.
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        data = line.encode(errors="backslashreplace") + b"\n"
        with named_errors(self.path, "give another place"):
            with self.path.open("ab") as file:
                file.truncate(self._whole)
                file.write(self._end + data)
            self._whole += len(self._end + data)
            self._end = b""

    def _read(self) -> Iterator[Row]:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from None
        lines = data.split(b"\n")
        self._whole = len(data)
        for number, line in enumerate(lines, start=1):
            unended = number == len(lines) and line  # cut off, or another program's way
            if not line.strip() and not unended:
                continue
            place = f"{self.path}:{number}"
            try:
                value = StrictJson().whole(line.decode())
                if not isinstance(value, dict):
                    raise ValueError("expected an object; one a line")
            except ValueError as error:
                if unended:
                    self._whole -= len(line)
                    return
                raise DataError(
                    f"{place}: {error}; correct or remove the line, or give another file"
                ) from None
            self._end = b"\n" if unended else b""
            yield Row(place, value)
