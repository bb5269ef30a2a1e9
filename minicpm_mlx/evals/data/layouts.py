"""A data file to its rows, in every layout that the sets were published in.

JSON Lines, JSON lists and parquet are read as training data is; here is what is not a list of
objects: tables without a header, compressed lines, one object a file, plain text.
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

__all__ = ["LARGEST", "rows"]

LARGEST = 1 << 28
"""Bytes that a file may have, uncompressed; the largest of these sets has 50 million."""


def rows(path: Path, columns: Sequence[str] = ()) -> list[Row]:
    """The rows of a file, in order; its name's ending tells the layout.

    `columns` names the cells of a .csv that has no header. Raises DataError with file and line, and
    MissingPackageError for .parquet without pyarrow.
    """
    if path.suffix == ".csv":
        return list(_table(path, columns))
    if path.name.endswith(".jsonl.gz"):
        return list(_lines(path))
    if path.suffix == ".txt":
        return [Row(str(path), {"text": _text(path)})]
    if path.suffix == ".json" and _text(path).lstrip()[:1] == "{":
        return list(_document(path))
    return [_good(row) for row in read_rows(path)]


def _good(row: Row | DataError) -> Row:
    if isinstance(row, DataError):
        raise row
    return row


def _table(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """A .csv; a column without a name, as pandas writes its index, is left out."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    header = list(columns)
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{place}: {error}; correct the quotes") from None
        if cells is None:
            return
        if not header:
            header = cells
        elif len(cells) == len(header):
            yield Row(place, {k: v for k, v in zip(header, cells, strict=True) if k})
        elif cells:
            raise DataError(
                f"{place}: expected {len(header)} cells ({', '.join(header)}), found {len(cells)}; "
                "take the file as its authors published it"
            )


def _lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield _object(line, f"{path}:{number}")


def _document(path: Path) -> Iterator[Row]:
    """One object, or BBH's {"canary": …, "examples": […]}."""
    text = _text(path)
    try:
        whole = StrictJson().whole(text)
    except ValueError:
        if path.suffix == ".json" and "\n" in text.strip():  # JSON Lines under another name
            yield from _lines(path)
            return
        raise DataError(f"{path}: expected JSON, found none; is the file whole?") from None
    if not isinstance(whole.get("examples"), list):
        yield Row(str(path), whole)
        return
    for number, example in enumerate(whole["examples"], start=1):
        yield Row(f"{path}: example {number}", _fields(example, f"{path}: example {number}"))


def _object(line: str, place: str) -> Row:
    try:
        return Row(place, _fields(StrictJson().whole(line), place))
    except ValueError as error:
        raise DataError(f"{place}: {error}") from None


def _fields(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place}: expected an object {{…}}, found {kind(value)}; correct it")
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
