"""Checks of what callers pass, so that a mistake is named where it was made."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from numbers import Real
from typing import Any

from .errors import InvalidArgumentError

NO_LISTS = (str, bytes, bytearray, memoryview, Mapping, type)
"""What can be indexed and yet is no list of things."""


def shown(value: object) -> str:
    """`value` for an error message: short, and on one line."""
    with suppress(ValueError):  # Python writes out no integer of more than 4300 digits
        return " ".join(reprlib.repr(value).split())
    return f"a very large {type(value).__name__}"


def is_whole(value: object) -> bool:
    """Whether `value` is an integer, Python's or an array library's; True and False are not."""
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return not isinstance(value, bool)


def whole(name: str, value: Any) -> int:
    """`value` as an int."""
    if not is_whole(value):
        raise InvalidArgumentError(f"{name} must be a whole number, got {shown(value)}")
    return operator.index(value)


def at_least_one(name: str, value: Any) -> int:
    """`value` as an int that counts tokens."""
    if whole(name, value) < 1:
        raise InvalidArgumentError(f"{name} must be 1 or more, got {shown(value)}")
    return operator.index(value)


def number(name: str, value: Any) -> float:
    """`value` as a float."""
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    raise InvalidArgumentError(f"{name} must be a number, got {shown(value)}")


def listed(name: str, value: Any, expected: str, fits: Callable[[Any], bool]) -> list[Any]:
    """What a list, tuple or flat array holds; an error where `value` is none, or not all fits."""
    flat = hasattr(value, "__getitem__") and getattr(value, "ndim", 1) == 1
    if not flat or isinstance(value, NO_LISTS):
        raise InvalidArgumentError(f"{name} must be {expected}, got {shown(value)}")
    items = list(value)
    for item in items:
        if not fits(item):
            found = f"a {type(value).__name__} with {shown(item)} in it"
            raise InvalidArgumentError(f"{name} must be {expected}, got {found}")
    return items


def expect(name: str, value: object, kind: type, expected: str) -> None:
    """Refuse a `value` that is not a `kind`."""
    if not isinstance(value, kind):
        raise InvalidArgumentError(f"{name} must be {expected}, got {shown(value)}")


def printable(text: object) -> str:
    """Words of a file's choosing, made fit for a message: one line, no escapes, not too long."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:200])
