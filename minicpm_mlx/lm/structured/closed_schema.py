"""Closes the objects of a JSON schema, for APIs whose schemas name all that may be written.

By the standard an object may have properties beside those that are named, unless
`additionalProperties` is false: a model held to such a schema can add properties without end. For
llama.cpp, Ollama and functions it may not, unless `additionalProperties` allows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ...errors import InvalidArgumentError
from .schema_check import LISTS, NAMED, ONE, target

COPIES = 200
"""Most copies of referenced schemas."""

Names = dict[tuple[str, str], None]
"""Properties by keyword and name, in order."""

_WORDS = {
    *("title", "description", "default", "example", "examples", "$comment"),
    *("deprecated", "readOnly", "writeOnly"),
}
"""Keywords that are for readers: they would make the schemas of many tools too large."""
_OPEN = ("additionalProperties", "")
"""Among Names: further properties are allowed."""
_NAMING = ("properties", "patternProperties")
_IN_PLACE = ("allOf", "anyOf", "oneOf")
"""Keywords whose schemas describe the same value as the schema that they are in."""


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which objects have no properties but those named, unless the schema says so.

    Descriptions and the like are left out.
    Schemas of one object (in `allOf`, behind `$ref` and so on) allow each other's properties. An
    object for which none is named stays open. InvalidArgumentError for too many combinations.
    """
    return _Closing(dict(schema)).result


class _Closing:
    def __init__(self, root: dict[str, Any]):
        self.root = root
        self.copies: dict[tuple[str, frozenset[tuple[str, str]]], str] = {}
        """Names of copies in the result's `$defs`, by reference and the properties beside it."""
        self.definitions: dict[str, Any] = {}
        self.result = self._close(root, {})
        if self.definitions and isinstance(self.result.setdefault("$defs", {}), dict):
            self.result["$defs"] |= self.definitions

    def _close(self, schema: Any, beside: Names) -> Any:
        """`schema` with its objects closed; other schemas of the same value name `beside`."""
        if not isinstance(schema, dict):
            return schema
        groups = list(self._groups(schema))
        named = [beside | _own_names(schema)]
        named += [self._names(schemas, set()) for _, schemas in groups]
        result = {
            keyword: self._close_inner(keyword, value)
            for keyword, value in schema.items()
            if keyword not in _WORDS
        }
        for number, (keyword, schemas) in enumerate(groups, 1):
            others = _union(named[:number] + named[number + 1 :])
            if keyword == "$ref":
                result[keyword] = self._reference(schema[keyword], others)
            else:
                result[keyword] += [self._close(inner, others) for inner in schemas]
        names = _union(named)
        names_any = any(isinstance(schema.get(keyword), dict) for keyword in _NAMING)
        if names_any and _OPEN not in names and "additionalProperties" not in schema:
            result["additionalProperties"] = False
            for keyword, name in names:
                if isinstance(properties := result.setdefault(keyword, {}), dict):
                    properties.setdefault(name, {})
        return result

    def _close_inner(self, keyword: str, value: Any) -> Any:
        """What `keyword` holds, with the schemas of other values closed."""
        if keyword in NAMED and isinstance(value, dict):
            return {name: self._close(inner, {}) for name, inner in value.items()}
        if keyword in LISTS and isinstance(value, list):
            return [] if keyword in _IN_PLACE else [self._close(inner, {}) for inner in value]
        return self._close(value, {}) if keyword in ONE else value

    def _reference(self, reference: str, beside: Names) -> str:
        """A reference to a copy closed for `beside`. Without any, the schema is closed in place."""
        if not beside:
            return reference
        key = (reference, frozenset(beside))
        if key not in self.copies:
            if len(self.copies) == COPIES:
                raise InvalidArgumentError(
                    f"the JSON schema: more than {COPIES} combinations of $ref with other "
                    "properties; state additionalProperties where they are"
                )
            self.copies[key] = name = f"minicpm-mlx.{len(self.copies)}"
            self.definitions[name] = self._close(target(self.root, reference), beside)
        return f"#/$defs/{self.copies[key]}"

    def _groups(self, schema: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
        """Other schemas of the same value, by keyword; of several in a group one has to fit."""
        for keyword in _IN_PLACE:
            if isinstance(schemas := schema.get(keyword), list):
                if keyword == "allOf":
                    yield from ((keyword, [inner]) for inner in schemas)
                else:
                    yield keyword, schemas
        if isinstance(reference := schema.get("$ref"), str):
            yield "$ref", [target(self.root, reference)]

    def _names(self, schemas: Iterable[Any], seen: set[int]) -> Names:
        """The properties that any of `schemas` names, alone or with others of the same value."""
        names: Names = {}
        for schema in schemas:
            if isinstance(schema, dict) and id(schema) not in seen:
                seen.add(id(schema))
                names |= _own_names(schema)
                for _, inner in self._groups(schema):
                    names |= self._names(inner, seen)
        return names


def _own_names(schema: dict[str, Any]) -> Names:
    names: Names = {}
    for keyword in _NAMING:
        if isinstance(schema.get(keyword), dict):
            names |= {(keyword, name): None for name in schema[keyword]}
    if isinstance(required := schema.get("required"), list):
        names |= {("properties", name): None for name in required if isinstance(name, str)}
    if schema.get("additionalProperties", False) is not False:
        names[_OPEN] = None
    return names


def _union(names: Iterable[Names]) -> Names:
    return {key: None for each in names for key in each}
