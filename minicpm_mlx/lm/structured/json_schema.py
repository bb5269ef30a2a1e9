"""JSON schemas that a text can be held to: what is not supported is refused, not ignored.

llguidance passes over keywords that it does not know and obeys `x-guidance`, its own; both would
change the result in silence. It also recurses as deep as a schema leads it, on a stack that has an
end, and gives some keywords as much memory as they ask for. `format` is kept to in shape alone: a
date may be 30 February.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from decimal import Decimal
from math import lcm
from typing import Any
from urllib.parse import unquote

from ...arguments import shown
from ...errors import InvalidArgumentError

ONE = {"items", "additionalItems", "additionalProperties"}
"""Keywords that hold a schema."""

LISTS = {"anyOf", "oneOf", "allOf", "prefixItems", "items"}
"""Those that hold a list of schemas."""

NAMED = {"properties", "patternProperties", "$defs", "definitions"}
"""Those that hold schemas by name."""

PLAIN = {
    "type",
    "const",
    "enum",
    "$ref",
    "required",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "minLength",
    "maxLength",
    "pattern",
    "format",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
}

NOTES = {
    "title",
    "description",
    "default",
    "example",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "$comment",
    "$schema",
    "$id",
    "id",
    "contentMediaType",
    "contentEncoding",
    "discriminator",
}
"""Those that allow and forbid nothing."""

KNOWN = ONE | LISTS | NAMED | PLAIN | NOTES

DEEP = 100
"""Objects and lists in each other; the library reads no more than 128."""

LONG = 1000
"""The same, along all references. Its stack of 8 MB holds 2,000 to 4,000."""

PROPERTIES = 400
"""Of one object. A text may go on with any of those that are optional, at some cost for each."""

MULTIPLES = 100_000
"""What numbers in multipleOf may come to. Each one is a state, of 6 microseconds and 300 bytes."""

WHITESPACE = r" {1,2}|\t|\r?\n( {0,32}|\t{0,8})"
"""May stand once wherever JSON takes space: enough to lay it out, but no lines without end."""

Path = tuple[str, ...]


def written(schema: object) -> str:
    """`schema` as the JSON text that llguidance is given.

    Raises InvalidArgumentError, naming the place, for what is no JSON or not supported.
    """
    try:
        # A copy of its own, of nothing but dicts, lists and so on.
        plain = json.loads(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"the JSON schema must be made of JSON: {error}") from None
    if not isinstance(plain, dict):
        raise InvalidArgumentError(f"the JSON schema must be an object, got {shown(schema)}")
    if _depth(plain) > DEEP:
        raise _wrong((), f"at most {DEEP} objects and lists may be in each other")
    parts = list(_parts(plain, ()))
    for path, part in parts:
        _check(path, part)
    _check_references(plain, [part["$ref"] for _, part in parts if "$ref" in part])
    _check_multiples([part["multipleOf"] for _, part in parts if "multipleOf" in part])
    return json.dumps(plain | {"x-guidance": {"whitespace_pattern": WHITESPACE}})


def _wrong(path: Path, reason: str) -> InvalidArgumentError:
    where = "#" + "".join(f"/{part}" for part in path)
    return InvalidArgumentError(f"the JSON schema, at {shown(where)}: {reason}")


def _depth(value: object) -> int:
    """Objects and lists in each other, counted to DEEP + 1."""
    layer, depth = [value], 0
    while depth <= DEEP:
        holders = [one for one in layer if isinstance(one, (dict, list))]
        if not holders:
            break
        layer = [x for one in holders for x in (one.values() if isinstance(one, dict) else one)]
        depth += 1
    return depth


def _parts(schema: dict[str, Any], path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """All schemas in `schema`, itself first, and where they are."""
    yield path, schema
    for keyword, value in schema.items():
        inner: list[tuple[Path, Any]] = []
        if keyword in NAMED and isinstance(value, dict):
            inner = [((*path, keyword, name), part) for name, part in value.items()]
        elif keyword in LISTS and isinstance(value, list):
            inner = [((*path, keyword, str(i)), part) for i, part in enumerate(value)]
        elif keyword in ONE:
            inner = [((*path, keyword), value)]
        for place, part in inner:
            if isinstance(part, dict):
                yield from _parts(part, place)


def _check(path: Path, schema: dict[str, Any]) -> None:
    """Refuse keywords that would be ignored, and those that are not kept to the letter."""
    if schema.get("uniqueItems") is False:  # asks for nothing
        del schema["uniqueItems"]
    for keyword in schema:
        if keyword not in KNOWN and (not keyword.startswith("x-") or keyword == "x-guidance"):
            raise _wrong(path, f"the keyword {shown(keyword)} is not supported; leave it out")
        if keyword in ("$id", "id") and path:
            raise _wrong(path, f"{keyword} is supported at the top alone")
    least, required = schema.get("minProperties"), schema.get("required")
    named = len(required) if isinstance(required, list) else 0
    if isinstance(least, (int, float)) and least > named + 1:
        # The library counts a property that is written twice as two.
        raise _wrong(
            path, f"minProperties must be at most one more than are required, got {shown(least)}"
        )
    properties = schema.get("properties")
    if isinstance(properties, dict) and len(properties) > PROPERTIES:
        raise _wrong(path, f"at most {PROPERTIES} properties, got {len(properties)}")


def _check_references(schema: dict[str, Any], references: list[Any]) -> None:
    length = _depth(schema)
    for reference in {one if isinstance(one, str) else shown(one) for one in references}:
        if reference != "#" and not reference.startswith("#/"):
            raise InvalidArgumentError(
                f"the JSON schema: $ref must point into the schema itself, with #/ in front, "
                f"got {shown(reference)}"
            )
        length += 1 + _depth(_target(schema, reference))
    if length > LONG:
        raise InvalidArgumentError(
            f"the JSON schema: objects and lists in each other, along references, are {length}; "
            f"expected at most {LONG}"
        )


def _target(schema: object, reference: str) -> object:
    """What `reference` points at; None where there is nothing, which the library will refuse."""
    for part in unquote(reference).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, dict):
            schema = schema.get(name)
        elif isinstance(schema, list) and name.isdecimal() and int(name) < len(schema):
            schema = schema[int(name)]
        else:
            return None
    return schema


def _check_multiples(values: list[Any]) -> None:
    """Refuse more states than there may be: of each, and of all where they meet in one number."""
    numbers = [Decimal(str(one)) for one in values if isinstance(one, (int, float)) and one > 0]
    digits = min((_exponent(one) for one in numbers), default=0)
    if digits < -20 or any(one.adjusted() > 20 for one in numbers):
        raise InvalidArgumentError("the JSON schema: multipleOf must be from 1e-20 to 1e20")
    together = lcm(*(int(one.scaleb(-digits)) for one in numbers))
    alone = sum(int(one.scaleb(-_exponent(one))) for one in numbers)
    if max(together, alone) > MULTIPLES:
        raise InvalidArgumentError(
            f"the JSON schema: the numbers in multipleOf, and their least common multiple, must be "
            f"at most {MULTIPLES}"
        )


def _exponent(number: Decimal) -> int:
    """Of the last digit that is not nought, 0 for whole numbers."""
    exponent = number.normalize().as_tuple().exponent
    assert isinstance(exponent, int)
    return min(exponent, 0)
