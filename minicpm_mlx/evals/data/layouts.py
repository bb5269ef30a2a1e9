"""Reads a data file's rows, in every layout that the sets were published in.

JSON Lines, JSON lists and parquet are read by `files.rows`. This module adds tables without a
header, compressed lines, one object a file, and plain text.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...files.rows import Row, kind, read_rows
from ...files.strict_json import StrictJson

LARGEST = 1 << 28
"""Largest file in bytes, uncompressed; the largest of these sets has 50 million."""


def rows(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """The rows of a file, in order; the file's suffix decides the layout.

    `columns` are the column names of a .csv without a header. Raises DataError with file and line,
    and MissingPackageError for .parquet without pyarrow.
    """
    if path.suffix == ".csv":
        return list(_table(path, columns))
    if path.name.endswith(".jsonl.gz"):
        return list(_lines(path))
    if path.suffix == ".txt":
        return [Row(str(path), {"text": _text(path)})]
    if path.suffix == ".json" and _text(path).lstrip()[:1] == "{":
        return list(_document(path))
    return [raise_error(row) for row in read_rows(path)]


def raise_error(row: Row | DataError) -> Row:
    """The row; raises it where it is an error."""
    if isinstance(row, DataError):
        raise row
    return row


def _table(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a .csv, without the unnamed column in which pandas writes its index."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    header = list(columns)
    while True:
        location = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{location}: {error}; correct the quotes") from None
        if cells is None:
            return
        if not header:
            header = cells
        elif len(cells) == len(header):
            yield Row(location, {k: v for k, v in zip(header, cells, strict=True) if k})
        elif cells:
            raise DataError(
                f"{location}: expected {len(header)} cells ({', '.join(header)}), found "
                f"{len(cells)}; take the file as its authors published it"
            )


def _lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield _object(line, f"{path}:{number}")


def _document(path: Path) -> Iterator[Row]:
    """Rows of a file with one object, or with BBH's {"canary": …, "examples": […]}."""
    text = _text(path)
    try:
        document = StrictJson().whole(text)
    except ValueError:
        if path.suffix == ".json" and "\n" in text.strip():  # JSON Lines with the suffix .json
            yield from _lines(path)
            return
        raise DataError(f"{path}: expected JSON, found none; is the file complete?") from None
    if not isinstance(document.get("examples"), list):
        yield Row(str(path), document)
        return
    for number, example in enumerate(document["examples"], start=1):
        yield Row(f"{path}: example {number}", _fields(example, f"{path}: example {number}"))


def _object(line: str, location: str) -> Row:
    try:
        return Row(location, _fields(StrictJson().whole(line), location))
    except ValueError as error:
        raise DataError(f"{location}: {error}") from None


def _fields(value: Any, location: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{location}: expected an object {{…}}, found {kind(value)}; correct it")
    return value


def _text(path: Path) -> str:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: {reason}; download it again") from None
    if len(data) > LARGEST:
        raise DataError(
            f"{path}: expected at most {LARGEST} bytes, found more; is it the right one?"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8, found byte {data[error.start]:#04x} at offset {error.start}; "
            "download it again"
        ) from None
