"""Parses JSON strictly: extensions that Python accepts are mistakes in a data file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ListItem:
    """One item of a list, and what is wrong with it."""

    line: int
    """Where it begins, from 1."""
    value: Any
    problem: str
    """"" where nothing is."""


class StrictJson:
    """Parses JSON without duplicate keys, NaN and infinities; ValueError names the fault.

    >>> StrictJson().whole('{"a": 1}')
    {'a': 1}
    """

    def __init__(self) -> None:
        # Noted and not raised at once, so that what follows in a list can still be read.
        self._problem = ""
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_int=self._integer
        )

    def whole(self, text: str) -> Any:
        """The one value that `text` is."""
        value, end = self._value(text, _space(text, 0))
        if (end := _space(text, end)) < len(text):
            raise ValueError(
                f"expected the line to end after its JSON, found {_piece(text, end)} "
                f"at character {end + 1}; one object a line"
            )
        if self._problem:
            raise ValueError(self._problem)
        return value

    def beginning(self, text: str) -> tuple[Any, int]:
        """The value that `text` begins with, and the number of lines that it takes."""
        start = _space(text, 0)
        value, end = self._value(text, start)
        return value, text.count("\n", start, end) + 1

    def items(self, text: str) -> Iterator[ListItem]:
        """The items of the list that `text` is, each as soon as it is read."""
        line, counted = 1, 0
        at = _space(text, _space(text, 0) + 1)  # after the bracket
        while text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            counted = at
            value, end = self._value(text, at, line)
            yield ListItem(line, value, self._problem)
            at = _space(text, end)
            if text[at : at + 1] == ",":
                at = _space(text, at + 1)
                if text[at : at + 1] == "]":
                    raise ValueError(f"{_at(text, at)}: found a comma before ]; remove it")
            elif text[at : at + 1] != "]":
                raise ValueError(
                    f"{_at(text, at)}: expected a comma or ] after it, found {_piece(text, at)}; "
                    "is the file whole?"
                )
        if (end := _space(text, at + 1)) < len(text):
            raise ValueError(
                f"{_at(text, end)}: expected nothing after the list, found {_piece(text, end)}; "
                "remove it"
            )

    def _value(self, text: str, at: int, line: int | None = None) -> tuple[Any, int]:
        """The value at `at` and where it ends; messages name the line if `line` is given."""
        self._problem = ""
        try:
            return self._decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            where = f"character {error.pos + 1}" if line is None else _at(text, error.pos)
            what = error.msg[:1].lower() + error.msg[1:]
            raise ValueError(
                f"not JSON at {where}: {what}, found {_piece(text, error.pos)}; correct it"
            ) from None
        except RecursionError:
            where = "" if line is None else f" (line {line})"
            raise ValueError(
                f"lists and objects are nested too deep{where}; expected a few levels"
            ) from None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            self._problem = f"expected each field once, found {twice!r} twice; remove one"
        return fields

    def _constant(self, name: str) -> None:
        self._problem = f"expected JSON, which has no {name}; write null or leave the field out"

    def _integer(self, digits: str) -> int:
        if len(digits) > 4000:  # which Python itself refuses to read
            self._problem = f"expected a number, found one of {len(digits)} digits; correct it"
            return 0
        return int(digits)


_SPACE = re.compile(r"[ \t\n\r]*")


def _space(text: str, at: int) -> int:
    """The first position from `at` on that is not white space."""
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _at(text: str, at: int) -> str:
    return f"line {text.count(chr(10), 0, at) + 1}"


def _piece(text: str, at: int) -> str:
    """The text at `at`, for a message."""
    return repr(text[at : at + 20].split("\n")[0]) if at < len(text) else "the end"
