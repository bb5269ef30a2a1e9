"""Reads and checks fields of a row, whichever published layout it comes in."""

from __future__ import annotations

from typing import Any

from ...errors import DataError
from ...files.rows import Row, kind, listed

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def value(row: Row, *names: str) -> Any:
    """The first of these fields that the row has, in any case; DataError if it has none."""
    fields = {name.lower(): content for name, content in row.value.items()}
    for name in names:
        if name.lower() in fields:
            return fields[name.lower()]
    raise DataError(
        f"{row.place}: expected a field {' or '.join(map(repr, names))}, "
        f"found {listed(row.value) or 'none'}; is this the set's own file?"
    )


def text(row: Row, *names: str) -> str:
    """The field as text; a number becomes its digits."""
    content = value(row, *names)
    if isinstance(content, int | float) and not isinstance(content, bool):
        return str(content)
    if not isinstance(content, str):
        raise wrong(row, names[0], "text", content)
    return content


def texts(row: Row, *names: str) -> list[str]:
    content = value(row, *names)
    if not isinstance(content, list) or not all(isinstance(item, str) for item in content):
        raise wrong(row, names[0], "a list of texts", content)
    return content


def four_options(row: Row) -> list[str]:
    """The options of a row with either a list `choices` or fields A to D, without empty ones."""
    if any(name.lower() == "choices" for name in row.value):
        return texts(row, "choices")
    cells = [value(row, letter) for letter in "abcd"]
    return [str(cell) for cell in cells if cell is not None]


def answer_index(row: Row, name: str, count: int) -> int:
    """Index of the correct one of `count` options, from a number counted from 0, or a letter."""
    content = value(row, name)
    if isinstance(content, str):
        content = LETTERS.find(content) if len(content) == 1 and content.isalpha() else content
    if isinstance(content, str) and content.isdecimal():
        content = int(content)
    if isinstance(content, bool) or not isinstance(content, int) or not 0 <= content < count:
        last = LETTERS[count - 1]
        raise wrong(row, name, f"A to {last}, or 0 to {count - 1},", value(row, name))
    return content


def wrong(row: Row, name: str, expected: str, content: object) -> DataError:
    """The error for a field with the wrong content."""
    shown = repr(content[:40]) if isinstance(content, str) else kind(content)
    hint = "; a test split without answers cannot be scored" if content in ("", None) else ""
    return DataError(
        f"{row.place}: expected {expected} in {name!r}, found {shown}{hint}; correct it"
    )
