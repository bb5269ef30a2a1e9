"""Files to rows, each with its place; what a row means is the business of formats.

A row that cannot be read is yielded as a DataError where the rows after it still can be, and is
raised where they cannot. Memory: a line at a time, but for .json lists and .txt, read whole.
"""

from __future__ import annotations

import codecs
import csv
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import DataError, MissingPackageError
from .strict_json import StrictJson

LINE_BYTES = 64 << 20
"""The longest line, and the longest .txt; a longer one is no sample but a mistake."""

LIST_BYTES = 2 << 30
"""The longest .json list, which takes several times its size to read."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sample as it stands in a file."""

    place: str
    """Where: the file and the line, or the number in a list, for messages."""
    value: dict[str, Any]
    """Field names to values."""


Rows = Iterator[Row | DataError]


def read_rows(path: Path) -> Rows:
    """The rows of a .jsonl, .json, .txt, .csv or .parquet file, in order.

    Raises DataError for a file that cannot be read on, or holds nothing, and MissingPackageError
    for .parquet without pyarrow.
    """
    empty = True
    try:
        for row in KINDS[kind_of(path)](path):
            empty = False
            yield row
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if empty:
        raise DataError(f"{path}: expected at least one sample, found none; add some")


def _json(path: Path) -> Rows:
    """A list, or a line for each sample: the first character tells, not the name."""
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    return _json_list(path) if start[:1] == b"[" else _json_lines(path)


def _json_lines(path: Path) -> Rows:
    parser = StrictJson()
    is_first = True
    for number, line in _lines(path):
        place = f"{path}:{number}"
        if isinstance(line, DataError):
            yield line
        elif line.strip():
            try:
                yield Row(place, _fields(parser.whole(line)))
            except ValueError as error:
                if is_first:
                    _refuse_indented(path)
                yield DataError(f"{place}: {error}")
            is_first = False


def _refuse_indented(path: Path) -> None:
    """DataError if a file begins with an object over several lines, as programs indent it."""
    if path.stat().st_size > LIST_BYTES:
        return
    try:
        value, lines = StrictJson().beginning(_text(path))
    except (ValueError, DataError):
        return
    if lines == 1 or not isinstance(value, dict):
        return
    raise DataError(
        f"{path}: expected a list of objects, or one object a line, found an object over {lines} "
        "lines; put [ and ] around all and commas between them, or write each on a line (jq -c); "
        "if it holds the list, write that alone"
    )


def _json_list(path: Path) -> Rows:
    if (size := path.stat().st_size) > LIST_BYTES:
        raise DataError(
            f"{path}: expected a list of at most {LIST_BYTES} bytes, found {size}; "
            "write one object a line instead (.jsonl)"
        )
    parser = StrictJson()
    items = parser.items(_text(path))
    for number in range(1, sys.maxsize):
        try:
            found = next(items, None)
        except ValueError as error:
            raise DataError(f"{path}: item {number}, {error}") from None
        if found is None:
            return
        place = f"{path}: item {number} (line {found.line})"
        try:
            if found.problem:
                raise ValueError(found.problem)
            yield Row(place, _fields(found.value))
        except ValueError as error:
            yield DataError(f"{place}: {error}")


def _fields(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    raise ValueError(f"expected an object {{…}}, found {kind(value)}; make it one")


def _txt(path: Path) -> Rows:
    """One document: where a paragraph ends is no end of a text."""
    if (size := path.stat().st_size) > LINE_BYTES:
        raise DataError(
            f"{path}: expected at most {LINE_BYTES} bytes in a .txt, which is read as one "
            f'document, found {size}; write its parts as {{"text": …}} lines (.jsonl)'
        )
    if (text := _text(path)).strip():
        yield Row(str(path), {"text": text.replace("\r\n", "\n")})


def _csv(path: Path) -> Rows:
    begun = 0  # the line that the reader is at

    def lines() -> Iterator[str]:
        nonlocal begun
        for number, line in _lines(path):
            if isinstance(line, DataError):
                raise line  # a cell may go on over lines, so there is no going on after it
            begun = number
            yield line

    with _long_cells():
        reader = csv.reader(lines(), strict=True)
        header: list[str] | None = None
        while True:
            place = f"{path}:{begun + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(f"{place}: {error}; correct the quotes") from None
            if cells is None:
                return
            if header is None:
                header = _header(cells, place)
            elif len(cells) == len(header):
                yield Row(place, {k: _cell(k, v) for k, v in zip(header, cells, strict=True)})
            elif cells:
                yield DataError(
                    f"{place}: expected {len(header)} cells as in the first line, "
                    f"found {len(cells)}; quote cells that hold commas"
                )


def _header(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) < len(names) or not all(names):
        raise DataError(
            f"{place}: expected the columns' names, each once, found {listed(names)}; "
            "put a line of names first"
        )
    return names


def _cell(name: str, cell: str) -> str | bool:
    """The cell's value; labels may be true or false, which .csv cannot mark as booleans."""
    if name in ("label", "kto_tag") and cell.lower() in ("true", "false"):
        return cell.lower() == "true"
    return cell


@contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module's limit, which is a global of it, raised meanwhile."""
    before = csv.field_size_limit(LINE_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Rows:
    try:  # by name, since it is no dependency and has no types
        pyarrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise MissingPackageError(f"{path}: .parquet needs pyarrow: pip install pyarrow") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"{path}: row {number}", value)
    except pyarrow.ArrowException as error:
        what = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: expected a .parquet file, found none ({what})") from None


def _lines(path: Path) -> Iterator[tuple[int, str | DataError]]:
    """Each line with its number, from 1."""
    with path.open("rb") as file:
        for number in range(1, sys.maxsize):
            line = file.readline(LINE_BYTES + 1)
            if not line:
                return
            if number == 1:
                line = _no_mark(path, line)
            place = f"{path}:{number}"
            try:
                if len(line) > LINE_BYTES:
                    while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                        pass
                    raise DataError(
                        f"{place}: expected a line of at most {LINE_BYTES} bytes, found a longer "
                        "one; one sample a line, ended by a newline"
                    )
                yield number, _decoded(line, place)
            except DataError as error:
                yield number, error


def _text(path: Path) -> str:
    """A whole file."""
    return _decoded(_no_mark(path, path.read_bytes()), str(path))


def _no_mark(path: Path, data: bytes) -> bytes:
    """`data`, which begins a file, without UTF-8's mark; an error for another encoding's."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: expected UTF-8, found UTF-16; save it as UTF-8")
    return data.removeprefix(codecs.BOM_UTF8)


def _decoded(data: bytes, place: str) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: expected UTF-8, found byte {data[error.start]:#04x} at offset "
            f"{error.start}; save it as UTF-8"
        ) from None
    if (at := text.find("\0")) >= 0:
        raise DataError(f"{place}: expected text, found a NUL character at {at}; remove it")
    return text


def kind(value: object) -> str:
    """JSON's name for the type of `value`, for messages."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def listed(names: Iterable[str]) -> str:
    """The first of some names, for messages: on one line whatever is in them."""
    first = list(islice(names, 6))
    shown = [name if name.isprintable() and name else repr(name) for name in first[:5]]
    return ", ".join([*(name[:40] for name in shown), *(["…"] if len(first) > 5 else [])])


KINDS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json,
    ".json": _json,
    ".txt": _txt,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""Readers by file suffix."""


def kind_of(path: Path) -> str:
    """The key in KINDS of a file, "" where it has none."""
    ending = path.suffix.lower()
    return ending if ending in KINDS else ""
