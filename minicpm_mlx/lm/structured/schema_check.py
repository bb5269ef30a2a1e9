"""Checks JSON schemas for llguidance: what is not supported is refused, not ignored.

llguidance ignores unknown keywords and obeys its own `x-guidance`; both would silently change the
result. It also recurses as deep as a schema does, on a finite stack, and some keywords take as much
memory as they ask for. `format` constrains only the shape: a date may be 30 February.
"""

from __future__ import annotations

import json
import re
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
"""Keywords that hold a list of schemas."""

NAMED = {"properties", "patternProperties", "$defs", "definitions"}
"""Keywords that hold schemas by name."""

PLAIN = {
    "type", "const", "enum", "$ref", "required", "pattern", "format", "multipleOf",
    "minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength",
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
}  # fmt: skip

NOTES = {
    "title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly",
    "$comment", "$schema", "$id", "id", "contentMediaType", "contentEncoding", "discriminator",
}  # fmt: skip
"""Annotations: keywords that allow and forbid nothing."""

COUNTS = {
    "minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength",
}  # fmt: skip

KNOWN = ONE | LISTS | NAMED | PLAIN | NOTES

DEEP = 100
"""Most nesting of objects and lists; llguidance reads no more than 128."""

LONG = 1000
"""Most nesting along all references; a stack of 8 MB holds 2,000 to 4,000."""

PROPERTIES = 400
"""Most properties of an object. Any optional one may come next, at some cost for each."""

MULTIPLES = 100_000
"""Most states for multipleOf: as many as the value itself, of 6 µs and 300 bytes each."""

WHITESPACE = r" {1,2}|\t|\r?\n( {0,32}|\t{0,8})"
"""White space allowed wherever JSON takes some: enough for indentation, but not endless lines."""

_INDEX = re.compile("0|[1-9][0-9]{0,8}")
"""The place of an item, in a reference."""

Path = tuple[str, ...]


def written(schema: object) -> str:
    """`schema` as JSON text for llguidance.

    Raises InvalidArgumentError, naming the path, for a schema that is not JSON or not supported.
    """
    try:
        # A copy made of plain dicts and lists only.
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
    """Nesting depth of objects and lists, counted up to DEEP + 1."""
    layer, depth = [value], 0
    while depth <= DEEP:
        parents = [value for value in layer if isinstance(value, (dict, list))]
        if not parents:
            break
        layer = [x for p in parents for x in (p.values() if isinstance(p, dict) else p)]
        depth += 1
    return depth


def _parts(schema: dict[str, Any], path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """All subschemas of `schema` with their paths, itself first."""
    yield path, schema
    for keyword, value in schema.items():
        inner: list[tuple[Path, Any]] = []
        if keyword in NAMED and isinstance(value, dict):
            inner = [((*path, keyword, name), part) for name, part in value.items()]
        elif keyword in LISTS and isinstance(value, list):
            inner = [((*path, keyword, str(i)), part) for i, part in enumerate(value)]
        elif keyword in ONE:
            inner = [((*path, keyword), value)]
        for inner_path, part in inner:
            if isinstance(part, dict):
                yield from _parts(part, inner_path)


def _check(path: Path, schema: dict[str, Any]) -> None:
    """Refuse keywords that would be ignored, or not followed exactly."""
    if schema.get("uniqueItems") is False:  # asks for nothing
        del schema["uniqueItems"]
    for keyword in schema:
        if keyword not in KNOWN and (not keyword.startswith("x-") or keyword == "x-guidance"):
            raise _wrong(path, f"the keyword {shown(keyword)} is not supported; leave it out")
        if keyword in ("$id", "id") and path:
            raise _wrong(path, f"{keyword} is supported at the top alone")
        if keyword in COUNTS and not _is_count(schema[keyword]):
            raise _wrong(path, f"{keyword} must be a count, got {shown(schema[keyword])}")
    types = schema.get("type", "object")
    if not all(isinstance(kind, str) for kind in (types if isinstance(types, list) else [types])):
        raise _wrong(path, f"type must be a name or a list of names, got {shown(types)}")
    least, required = schema.get("minProperties"), schema.get("required")
    named = len(required) if isinstance(required, list) else 0
    if isinstance(least, (int, float)) and least > named + 1:
        # llguidance counts a property that is written twice as two.
        raise _wrong(
            path, f"minProperties must be at most one more than are required, got {shown(least)}"
        )
    properties = schema.get("properties")
    if isinstance(properties, dict) and len(properties) > PROPERTIES:
        raise _wrong(path, f"at most {PROPERTIES} properties, got {len(properties)}")


def _is_count(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and value >= 0


def _check_references(schema: dict[str, Any], references: list[Any]) -> None:
    length = _depth(schema)
    for reference in {ref if isinstance(ref, str) else shown(ref) for ref in references}:
        if reference != "#" and not reference.startswith("#/"):
            raise InvalidArgumentError(
                f"the JSON schema: $ref must point into the schema itself, with #/ in front, "
                f"got {shown(reference)}"
            )
        length += 1 + _depth(target(schema, reference))
    if length > LONG:
        raise InvalidArgumentError(
            f"the JSON schema: objects and lists in each other, along references, are {length}; "
            f"expected at most {LONG}"
        )


def target(schema: object, reference: str) -> object:
    """The value `reference` points at; None if there is none, which llguidance refuses."""
    for part in unquote(reference).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, dict):
            schema = schema.get(name)
        elif isinstance(schema, list) and _INDEX.fullmatch(name) and int(name) < len(schema):
            schema = schema[int(name)]
        else:
            return None
    return schema


def _check_multiples(values: list[Any]) -> None:
    """Refuse too many states: of all values together, or of the lcm if they apply to one number."""
    numbers = [
        Decimal(str(value))
        for value in values
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    ]
    digits = min(map(_exponent, numbers), default=0)
    if digits < -20 or any(number.adjusted() > 20 for number in numbers):
        raise InvalidArgumentError("the JSON schema: multipleOf must be from 1e-20 to 1e20")
    combined = lcm(*(int(number.scaleb(-digits)) for number in numbers))
    separate = sum(int(number.scaleb(-_exponent(number))) for number in numbers)
    if max(combined, separate) > MULTIPLES:
        raise InvalidArgumentError(
            f"the JSON schema: the numbers in multipleOf, and their least common multiple, must be "
            f"at most {MULTIPLES}"
        )


def _exponent(number: Decimal) -> int:
    """Exponent of the last digit that is not 0; 0 for whole numbers."""
    exponent = number.normalize().as_tuple().exponent
    assert isinstance(exponent, int)
    return min(exponent, 0)
