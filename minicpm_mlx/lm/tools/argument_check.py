"""Checks the arguments of a call against the schema of its function.

Names, types and choices are checked, which data sets get wrong. Of the rest of JSON schema
nothing is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...arguments import shown
from ...errors import InvalidArgumentError
from ...files.rows import listed
from ..structured.schema_check import target

_DEEP = 100
"""Most schemas in each other that are looked into."""


def argument_problem(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> str | None:
    """The first thing in `arguments` that `schema` does not allow; None if there is nothing.

    It is to be read after the name of the function.
    """
    return next(_problems(dict(arguments), {"type": "object", **schema}, schema, "", 0), None)


def _problems(
    value: Any, schema: Any, root: Mapping[str, Any], path: str, depth: int
) -> Iterator[str]:
    """Problems of a value, to be read after the name of the function."""
    if not isinstance(schema, Mapping) or depth > _DEEP:
        return
    if isinstance(reference := schema.get("$ref"), str):
        try:
            yield from _problems(value, target(dict(root), reference), root, path, depth + 1)
        except InvalidArgumentError:
            return
    for keyword in ("anyOf", "oneOf"):
        choices = schema.get(keyword)
        if isinstance(choices, list) and choices:
            found = [next(_problems(value, one, root, path, depth + 1), None) for one in choices]
            if None not in found:
                yield str(found[0])
    for part in _listed(schema.get("allOf")):
        yield from _problems(value, part, root, path, depth + 1)
    types = _listed(schema.get("type"))
    if types and not any(_fits(value, kind) for kind in types):
        yield f"{path}: expected {' or '.join(map(str, types))}, found {shown(value)}"
        return
    choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(choices, list) and value not in choices:
        yield f"{path}: expected one of {listed(map(str, choices))}, found {shown(value)}"
    if isinstance(value, dict):
        yield from _object_problems(value, schema, root, path, depth)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _problems(item, schema.get("items"), root, f"{path}[{index}]", depth + 1)


def _object_problems(
    value: dict[str, Any], schema: Mapping[str, Any], root: Mapping[str, Any], path: str, depth: int
) -> Iterator[str]:
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    for key in _listed(schema.get("required")):
        if isinstance(key, str) and key not in value:
            yield f"{path}: expected {key}, which is required, found {listed(value) or 'nothing'}"
    for key, item in value.items():
        if key in properties:
            yield from _problems(item, properties[key], root, f"{path}.{key}", depth + 1)
        elif not path and not _is_open(schema):
            known = listed(map(str, properties))
            expected = f"its parameters alone ({known})" if known else "no parameters"
            yield f": expected {expected}, found {listed([key])}"


def _is_open(schema: Mapping[str, Any]) -> bool:
    """Whether a function takes parameters that it does not name."""
    elsewhere = ("patternProperties", "$ref", "allOf", "anyOf", "oneOf")
    return bool(schema.get("additionalProperties")) or any(map(schema.get, elsewhere))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _fits(value: Any, kind: object) -> bool:
    """Whether a value of JSON has a type; one that JSON has not fits any."""
    if kind == "boolean" or isinstance(value, bool):
        return kind not in _TYPES or (kind == "boolean" and isinstance(value, bool))
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return kind not in _TYPES or isinstance(value, _TYPES[str(kind)])


_TYPES: dict[object, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
