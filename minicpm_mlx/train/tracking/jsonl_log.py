"""A run's events as lines of JSON: appended as they come, read back to draw them or to go on."""

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
"""Events by the name they have in a log."""


ADVICE = "give another place"


@dataclass(frozen=True)
class LogRecord:
    """A line of a log."""

    time: float
    """Seconds since 1970, UTC."""
    event: Event


class JsonLog:
    """A listener that appends each event to the file `path`, on the disk before it returns.

    A run that begins at step n first drops what the file says of steps after n, which will be
    written again; one that begins at 0 drops everything. InvalidArgumentError where `path` holds
    something else or cannot be one; StorageError where it cannot be written.
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
        old = _lines(self.path) if self.path.exists() else ()
        kept = [line for line, record in old if step and record.event.step <= step]
        content = b"".join(line + b"\n" for line in kept)
        with named_errors(self.path, ADVICE):
            write_whole(self.path, lambda part: part.write_bytes(content))


def to_line(event: Event, moment: float | None = None) -> str:
    """One line of JSON without its end: the kind of event, the time, and the event's fields.

    `moment` is in seconds since 1970, by default now. JSON has no NaN: such numbers are null.
    """
    head = {
        "event": type(event).__name__.lower(),
        "time": time.time() if moment is None else moment,
    }
    line = json.dumps(_plain({**head, **asdict(event)}), ensure_ascii=False, allow_nan=False)
    # A file's name may hold bytes that are no text; \\udc80 is how JSON writes what they become.
    return line.encode(errors="backslashreplace").decode()


def read_log(path: Path) -> list[LogRecord]:
    """What a log says, in its order; a last line that was cut off is left out.

    InvalidArgumentError where the file cannot be read or a line is no event.
    """
    return [record for _, record in _lines(path)]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _lines(path: Path) -> list[tuple[bytes, LogRecord]]:
    if path.exists() and not path.is_file():  # a device or a pipe may have no end
        raise InvalidArgumentError(f"{path}: expected a file, found something else")
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InvalidArgumentError(f"{path}: {error.strerror or error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            if line:
                found.append((line, _record(line)))
        except ValueError as error:
            if number == len(lines):  # what a process was writing when it was killed
                break
            raise InvalidArgumentError(
                f"{path}, line {number}: no event of a training run ({error}); expected a log as "
                "JsonLog writes it; give another file"
            ) from None
    return found


def _record(line: bytes) -> LogRecord:
    row = StrictJson().whole(line.decode())
    name = row.get("event") if isinstance(row, dict) else None
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"expected an object whose event is one of {', '.join(KINDS)}")
    kind = KINDS[name]
    types = get_type_hints(kind)
    fields = {field: _field(row, field, types[field]) for field in types}
    return LogRecord(_field(row, "time", float), kind(**fields))


def _field(row: dict[str, Any], name: str, kind: Any) -> Any:
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
    return {name: _number(one) for name, one in _exactly(dict)(value).items()}


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
"""By a field's type: its value as JSON to what it was."""
