"""Checks of what callers pass, so that a mistake is named where it was made."""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
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


def json_number(value: Any) -> Any:
    """`value`, as an int where it is a whole number that JSON wrote as 20.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def whole(name: str, value: Any) -> int:
    """`value` as an int."""
    if not is_whole(value):
        raise InvalidArgumentError(f"must be a whole number, got {shown(value)}", field=name)
    return operator.index(value)


def at_least_one(name: str, value: Any) -> int:
    """`value` as an int that counts tokens."""
    if whole(name, value) < 1:
        raise InvalidArgumentError(f"must be 1 or more, got {shown(value)}", field=name)
    return operator.index(value)


def number(name: str, value: Any) -> float:
    """`value` as a float."""
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    raise InvalidArgumentError(f"must be a number, got {shown(value)}", field=name)


def listed(name: str, value: Any, expected: str, fits: Callable[[Any], bool]) -> list[Any]:
    """What a list, tuple or flat array holds; an error where `value` is none, or not all fits."""
    flat = hasattr(value, "__getitem__") and getattr(value, "ndim", 1) == 1
    if not flat or isinstance(value, NO_LISTS):
        raise InvalidArgumentError(f"must be {expected}, got {shown(value)}", field=name)
    items = list(value)
    for item in items:
        if not fits(item):
            found = f"a {type(value).__name__} with {shown(item)} in it"
            raise InvalidArgumentError(f"must be {expected}, got {found}", field=name)
    return items


def expect(name: str, value: object, kind: type, expected: str) -> None:
    """Refuse a `value` that is not a `kind`."""
    if not isinstance(value, kind):
        raise InvalidArgumentError(f"must be {expected}, got {shown(value)}", field=name)


def one_of(name: str, value: object, choices: Collection[str]) -> None:
    """Refuse a `value` that is none of `choices`."""
    if value not in choices:
        raise InvalidArgumentError(
            f"must be one of {', '.join(choices)}, got {shown(value)}", field=name
        )


def printable(text: object, length: int | None = 200) -> str:
    """Words of a file's choosing, made fit for a message: one line, no escapes, not too long."""
    return "".join(
        c if c.isprintable() else " " if c.isspace() else "?" for c in str(text)[:length]
    )


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The numbers that an option may have."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    """Exclusive, unlike `least`."""
    below: float = math.inf
    """Exclusive, unlike `most`."""
    whole: bool = False

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        """For messages and help: "between 0 and 1", "above 0", "1 or more"."""
        if self.least > -math.inf and self.most < math.inf:
            return f"between {_plain(self.least)} and {_plain(self.most)}"
        ends = [
            f"{_plain(self.least)} or more" if self.least > -math.inf else "",
            f"above {_plain(self.above)}" if self.above > -math.inf else "",
            f"at most {_plain(self.most)}" if self.most < math.inf else "",
            f"below {_plain(self.below)}" if self.below < math.inf else "",
        ]
        return " and ".join(filter(None, ends))

    def check(self, name: str, value: Any) -> int | float:
        """`value` as a Python number; InvalidArgumentError, with its field, outside the limit."""
        plain = whole(name, value) if self.whole else number(name, value)
        if plain not in self:
            raise InvalidArgumentError(f"must be {self}, got {shown(value)}", field=name)
        return plain


def _plain(bound: float) -> str:
    exponent = math.log2(bound + 1) if bound >= 2**53 - 1 else 0.0
    return f"2^{exponent:.0f} - 1" if exponent else f"{bound:g}"


def limited(default: Any, **limit: Any) -> Any:
    """A dataclass field with a declared `Limit`; a default of None allows None.

    temperature: float = limited(0.0, least=0, most=100)
    """
    return field(default=default, metadata={"limit": Limit(**limit)})


def limits(options: Any) -> dict[str, Limit]:
    """Declared limits of a dataclass, or of an instance of one, by field."""
    return {f.name: f.metadata["limit"] for f in fields(options) if "limit" in f.metadata}


def check_limits(options: Any) -> None:
    """Check each limited field of a dataclass instance, for its __post_init__.

    Numbers of array libraries become Python's, which JSON can write.
    """
    optional = {f.name for f in fields(options) if f.default is None}
    for name, limit in limits(options).items():
        value = getattr(options, name)
        if value is not None or name not in optional:
            object.__setattr__(options, name, limit.check(name, value))
