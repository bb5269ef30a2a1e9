"""Checks the arguments of a call against the schema of its function.

Names, types and choices are checked, which data sets get wrong. Of the rest of JSON schema
nothing is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ...arguments import shown
from ...files.rows import listed
from ..structured.schema_check import target

_DEEP = 100
"""Most schemas in each other that are looked into."""


def argument_problem(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> str | None:
    """The first thing in `arguments` that `schema` does not allow; None if there is nothing.

    It is to be read after the name of the function.
    """
    return _Check(dict(schema)).problem(dict(arguments), {"type": "object", **schema}, "", 0)


class _Check:
    """Checks values against a schema and those that it refers to, each pair of them once."""

    def __init__(self, root: dict[str, Any]):
        self.root = root
        self.found: dict[tuple[str, int, int], str | None] = {}
        """The first problem by the place of a value, the value and the schema."""

    def problem(self, value: Any, schema: Any, path: str, depth: int) -> str | None:
        """The first problem of a value, to be read after the name of the function."""
        if not isinstance(schema, Mapping) or depth > _DEEP:
            return None
        key = path, id(value), id(schema)
        if key not in self.found:
            self.found[key] = None  # a schema that leads to itself adds nothing
            self.found[key] = next(self._problems(value, schema, path, depth + 1), None)
        return self.found[key]

    def _problems(
        self, value: Any, schema: Mapping[str, Any], path: str, depth: int
    ) -> Iterator[str]:
        if isinstance(reference := schema.get("$ref"), str):
            yield from self._each([(value, target(self.root, reference), path)], depth)
        for keyword in ("anyOf", "oneOf"):
            choices = schema.get(keyword)
            if isinstance(choices, list) and choices:
                found = [self.problem(value, one, path, depth) for one in choices]
                if None not in found:
                    yield str(found[0])
        yield from self._each([(value, part, path) for part in _listed(schema.get("allOf"))], depth)
        types = [kind for kind in _listed(schema.get("type")) if isinstance(kind, str)]
        if types and not any(_fits(value, kind) for kind in types):
            yield f"{path}: expected {' or '.join(types)}, found {shown(value)}"
            return
        choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(choices, list) and value not in choices:
            yield f"{path}: expected one of {listed(map(str, choices))}, found {shown(value)}"
        if isinstance(value, dict):
            yield from self._object_problems(value, schema, path, depth)
        elif isinstance(value, list):
            items = [(item, schema.get("items"), f"{path}[{i}]") for i, item in enumerate(value)]
            yield from self._each(items, depth)

    def _object_problems(
        self, value: dict[str, Any], schema: Mapping[str, Any], path: str, depth: int
    ) -> Iterator[str]:
        properties = schema.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        for key in _listed(schema.get("required")):
            if isinstance(key, str) and key not in value:
                found = listed(value) or "nothing"
                yield f"{path}: expected {key}, which is required, found {found}"
        for key, item in value.items():
            if key in properties:
                yield from self._each([(item, properties[key], f"{path}.{key}")], depth)
            elif not path and not _is_open(schema):
                known = listed(map(str, properties))
                expected = f"its parameters alone ({known})" if known else "no parameters"
                yield f": expected {expected}, found {listed([key])}"

    def _each(self, places: Iterable[tuple[Any, Any, str]], depth: int) -> Iterator[str]:
        """The first problem of each value with its schema, at its path."""
        for value, schema, path in places:
            if (problem := self.problem(value, schema, path, depth)) is not None:
                yield problem


def _is_open(schema: Mapping[str, Any]) -> bool:
    """Whether a function takes parameters that it does not name."""
    elsewhere = ("patternProperties", "$ref", "allOf", "anyOf", "oneOf")
    return bool(schema.get("additionalProperties")) or any(map(schema.get, elsewhere))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _fits(value: Any, kind: str) -> bool:
    """Whether a value of JSON has a type; one that JSON has not fits any."""
    if kind == "boolean" or isinstance(value, bool):
        return kind not in _TYPES or (kind == "boolean" and isinstance(value, bool))
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return kind not in _TYPES or isinstance(value, _TYPES[kind])


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
