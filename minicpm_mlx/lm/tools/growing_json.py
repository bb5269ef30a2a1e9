"""JSON text of a call's arguments that only grows, while the model still writes them."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

DIGITS = 400
"""Most characters of a number that is read as it is."""

_PLAIN = re.compile(r'[^"\\]+')
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|u....|[^u])", re.DOTALL)
_FIRST_HALF = re.compile(r"\\u[dD][89abAB]..(?:\\(?:u.{0,3})?)?\Z", re.DOTALL)
"""Of a surrogate pair, at the end of what has come."""
_HALVES = re.compile("[\ud800-\udfff]")
_SPACE = re.compile(r"\s*")
_SCALAR = re.compile(r'[^\s{}\[\]",:]+')
_SIGNS = {"{": "{", "}": "}", "[": "[", "]": "]", ",": ", ", ":": ": ", '"': '"'}


class GrowingJson:
    """Rewrites a JSON value, as it comes, in the layout of `json.dumps`.

    What it returns is final. The value is expected to be valid; half a surrogate pair becomes
    U+FFFD, and a number beyond all floats the greatest one.
    """

    def __init__(self) -> None:
        self.rest = ""
        """Text that is not read yet; after the end, what follows the value."""
        self.depth = 0
        self.in_string = False
        self.ended = False

    def add(self, text: str) -> str:
        """More of the value, as far as it is certain."""
        self.rest += text
        at, out = 0, list[str]()
        while not self.ended and at < len(self.rest):
            step = self._string(at) if self.in_string else self._value(at)
            if step is None:
                break
            at, grown = step
            out.append(grown)
        self.rest = self.rest[at:]
        return "".join(out)

    def _string(self, at: int) -> tuple[int, str] | None:
        text = self.rest
        if plain := _PLAIN.match(text, at):
            return plain.end(), _inner(plain[0])
        if text[at] == '"':
            self.in_string, self.ended = False, not self.depth
            return at + 1, '"'
        escape = None if _FIRST_HALF.match(text, at) else _ESCAPE.match(text, at)
        return (escape.end(), _inner(_unescaped(escape[0]))) if escape else None

    def _value(self, at: int) -> tuple[int, str] | None:
        at = _SPACE.match(self.rest, at).end()  # type: ignore[union-attr]
        sign = self.rest[at : at + 1]
        if sign in _SIGNS:
            self.in_string = sign == '"'
            self.depth += (sign in "{[") - (sign in "}]")
            self.ended = sign in "}]" and self.depth <= 0
            return at + 1, _SIGNS[sign]
        scalar = _SCALAR.match(self.rest, at)
        if scalar is None or scalar.end() == len(self.rest):
            return None
        self.ended = not self.depth
        return scalar.end(), _scalar(scalar[0])


def sound_json(value: Any) -> str:
    """A value as JSON text, in which every number and every text is one that JSON has."""
    return GrowingJson().add(json.dumps(value) + " ")


def whole_members(text: str) -> dict[str, Any]:
    """The members that are complete in the beginning of an object as GrowingJson writes it."""
    decoder, members, at = json.JSONDecoder(), dict[str, Any](), 1
    try:
        while text[at : at + 1] == '"':
            key, at = decoder.raw_decode(text, at)
            value, at = decoder.raw_decode(text, at + len(": "))
            if at == len(text):  # a number may go on
                break
            members[key], at = value, at + len(", ")
    except ValueError:
        pass
    return members


def _inner(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _unescaped(escape: str) -> str:
    try:
        return _HALVES.sub("\ufffd", json.loads(f'"{escape}"'))
    except ValueError:
        return escape[1:]


def _scalar(text: str) -> str:
    if text in ("true", "false", "null"):
        return text
    try:
        number = json.loads(text) if len(text) <= DIGITS else float("inf")
        return json.dumps(number, allow_nan=False)
    except ValueError:
        return json.dumps(sys.float_info.max * (-1 if text[0] == "-" else 1))
