"""What a row must hold, whichever of its published layouts it comes in."""

from __future__ import annotations

from typing import Any

from ...errors import DataError
from ...files.rows import Row, kind, listed

__all__ = ["LETTERS", "answer_place", "four_options", "text", "texts", "value"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def value(row: Row, *names: str) -> Any:
    """The first of these fields that the row has, in whatever case; DataError if it has none."""
    found = {name.lower(): content for name, content in row.value.items()}
    for name in names:
        if name.lower() in found:
            return found[name.lower()]
    raise DataError(
        f"{row.place}: expected a field {' or '.join(map(repr, names))}, "
        f"found {listed(row.value) or 'none'}; is this the set's own file?"
    )


def text(row: Row, *names: str) -> str:
    """That field as text; a number is written out."""
    content = value(row, *names)
    if isinstance(content, int | float) and not isinstance(content, bool):
        return str(content)
    if not isinstance(content, str):
        raise wrong(row, names[0], "text", content)
    return content


def texts(row: Row, *names: str) -> list[str]:
    """That field as a list of texts."""
    content = value(row, *names)
    if not isinstance(content, list) or not all(isinstance(each, str) for each in content):
        raise wrong(row, names[0], "a list of texts", content)
    return content


def four_options(row: Row) -> list[str]:
    """The options of a row with either a list `choices` or fields A to D; those that are there."""
    if any(name.lower() == "choices" for name in row.value):
        return texts(row, "choices")
    cells = [value(row, letter) for letter in "abcd"]
    return [str(cell) for cell in cells if cell is not None]


def answer_place(row: Row, name: str, count: int) -> int:
    """The place of the right one of `count` options: given as its number from 0, or its letter."""
    content = value(row, name)
    if isinstance(content, str):
        content = LETTERS.find(content) if len(content) == 1 and content.isalpha() else content
    if isinstance(content, str) and content.isdecimal():
        content = int(content)
    if isinstance(content, bool) or not isinstance(content, int) or not 0 <= content < count:
        last = LETTERS[count - 1]
        raise wrong(row, name, f"A to {last}, or 0 to {count - 1},", value(row, name))
    return content


def wrong(row: Row, name: str, expected: str, found: object) -> DataError:
    """The error for a field that is there and not what it must be."""
    shown = repr(found[:40]) if isinstance(found, str) else kind(found)
    hint = "; a test split without answers cannot be scored" if found in ("", None) else ""
    return DataError(
        f"{row.place}: expected {expected} in {name!r}, found {shown}{hint}; correct it"
    )
