"""Logs the events of a run as lines of JSON, and reads them back."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ...errors import InvalidArgumentError
from ...files.atomic import named_errors, write_whole
from ...files.strict_json import StrictJson
from .events import Event, Started

KINDS: dict[str, type[Event]] = {kind.__name__.lower(): kind for kind in get_args(Event)}
"""Event classes by their name in a log."""

FIELDS = {name: get_type_hints(kind) for name, kind in KINDS.items()}

ADVICE = "give another place"


@dataclass(frozen=True)
class LogRecord:
    """A line of a log."""

    time: float
    """Seconds since 1970, UTC."""
    event: Event


class JsonLog:
    """A listener that appends each event to the file `path`.

    A run that starts at step n first deletes the events after step n, which it will log again; one
    that starts at 0 deletes all. InvalidArgumentError: `path` holds another file, or its folder is
    missing. StorageError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        if not path.parent.is_dir():
            raise InvalidArgumentError(f"{path.parent}: no folder for a log; make it first")
        if path.exists():
            read_log(path)
        self.path = path

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self._rewind(event.step)
        with named_errors(self.path, ADVICE), self.path.open("ab") as file:
            file.write(f"{to_line(event)}\n".encode())

    def _rewind(self, step: int) -> None:
        lines = _read(self.path) if step and self.path.exists() else ()
        content = b"".join(line + b"\n" for line, record in lines if record.event.step <= step)
        with named_errors(self.path, ADVICE):
            write_whole(self.path, lambda partial: partial.write_bytes(content))


def to_line(event: Event, moment: float | None = None) -> str:
    """Formats an event as one line of JSON: kind, time, and fields.

    `moment` is in seconds since 1970, by default now. NaN and infinity become null.
    """
    head = {
        "event": type(event).__name__.lower(),
        "time": time.time() if moment is None else moment,
    }
    line = json.dumps(_to_json({**head, **asdict(event)}), ensure_ascii=False, allow_nan=False)
    # A file name may hold bytes that are not text; JSON can write their surrogates as \udc80.
    return line.encode(errors="backslashreplace").decode()


def read_log(path: Path) -> list[LogRecord]:
    """Reads a log in order, without a last line that was cut off.

    InvalidArgumentError: the file cannot be read, or a line is not an event.
    """
    return [record for _, record in _read(path)]


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_json(item) for name, item in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _read(path: Path) -> list[tuple[bytes, LogRecord]]:
    if path.exists() and not path.is_file():  # a device or a pipe may have no end
        raise InvalidArgumentError(f"{path}: expected a file, found something else")
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InvalidArgumentError(f"{path}: {error.strerror or error}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            if line:
                records.append((line, _parse(line)))
        except ValueError as error:
            if number == len(lines):  # the process was killed while writing it
                break
            raise InvalidArgumentError(
                f"{path}, line {number}: not an event of a training run ({error}); expected a log "
                "as JsonLog writes it; give another file"
            ) from None
    return records


def _parse(line: bytes) -> LogRecord:
    row = StrictJson().whole(line.decode())
    name = row.get("event") if isinstance(row, dict) else None
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"expected an object whose event is one of {', '.join(KINDS)}")
    kind = KINDS[name]
    fields = {field: _parse_field(row, field, type_) for field, type_ in FIELDS[name].items()}
    return LogRecord(_parse_field(row, "time", float), kind(**fields))


def _parse_field(row: dict[str, Any], name: str, kind: Any) -> Any:
    try:
        return READERS[kind](row[name])
    except (KeyError, TypeError, OverflowError):
        raise ValueError(f"expected a field {name} that is a {kind}") from None


def _number(value: Any) -> float:
    if value is None:
        return math.nan
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError
    return float(value)


def _numbers(value: Any) -> dict[str, float]:
    return {name: _number(item) for name, item in _exactly(dict)(value).items()}


def _exactly(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError
        return value

    return read


READERS: dict[Any, Callable[[Any], Any]] = {
    int: _exactly(int),
    float: _number,
    bool: _exactly(bool),
    str: _exactly(str),
    Path: lambda value: Path(_exactly(str)(value)),
    dict[str, float]: _numbers,
}
"""Parsers of JSON values, by the type of a field."""
