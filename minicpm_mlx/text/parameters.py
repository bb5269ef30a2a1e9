"""The parameters of a function, wherever the JSON schema of its arguments states them.

Programs that write schemas put them behind a `$ref`, or in parts: `allOf`, `anyOf`, `oneOf`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..arguments import shown
from ..errors import InvalidArgumentError

Schema = Mapping[str, Any]

_COMBINING = ("$ref", "allOf", "anyOf", "oneOf")
_MOST = 50
"""Most combinations of parts."""
_VISITS = 1000
"""Most parts that are looked at."""


def properties_of(schema: Schema) -> Mapping[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def list_of(schema: Schema, name: str) -> list[Any]:
    items = schema.get(name)
    return items if isinstance(items, list) else []


def target(schema: object, reference: str) -> object:
    """The schema that a reference within `schema` names; None if there is none."""
    for part in reference.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        schema = schema.get(name) if isinstance(schema, Mapping) else None
    return schema


def parameters_of(schema: Schema) -> Schema:
    """`schema` with the parameters of all its parts in `properties`, and those that every call
    needs in `required`; as it is where they cannot be told."""
    if not any(keyword in schema for keyword in _COMBINING):
        return schema
    try:
        found = list(_merged_parts(schema, holds=False))
    except InvalidArgumentError:
        return schema
    limits: dict[str, list[Any]] = {}
    for one in found:
        for name, limit in one["properties"].items():
            limits.setdefault(name, []).append(limit)
    properties = {name: _joined("anyOf", several) for name, several in limits.items()}
    required = [name for name in properties if all(name in one["required"] for one in found)]
    return {**schema, "properties": properties, "required": required}


def alternatives(schema: Schema) -> list[dict[str, Any]]:
    """The `properties` and `required` of objects, each of which is all right for `schema`.

    InvalidArgumentError where there are none, or where these would not be enough.
    """
    found = list(_merged_parts(schema, holds=True))
    if not found:
        raise _refused("type", "no arguments fit it")
    return found


def are_apart(schemas: Sequence[Any], root: Schema) -> bool:
    """Whether no value can fit two of `schemas`, by type or by a field with its own constant."""
    seen: set[Any] = set()
    for schema in schemas:
        if isinstance(schema, Mapping) and isinstance(reference := schema.get("$ref"), str):
            schema = target(root, reference)
        marks = _marks(schema) if isinstance(schema, Mapping) else set()
        if not marks or marks & seen:
            return False
        seen |= marks
    objects = {mark[0] for mark in seen if isinstance(mark, tuple)}
    return not (("object" in seen and objects) or len(objects) > 1)


def _marks(schema: Schema) -> set[Any]:
    required = list_of(schema, "required")
    for name, inner in properties_of(schema).items():
        if name in required and isinstance(inner, Mapping):
            values = list_of(inner, "enum") + ([inner["const"]] if "const" in inner else [])
            if values:
                return {(name, json.dumps(value)) for value in values}
    kind = schema.get("type")
    kinds = {kind} if isinstance(kind, str) else set(kind or ())
    return kinds | ({"integer"} if "number" in kinds else set())


def _merged_parts(schema: Schema, holds: bool) -> Iterator[dict[str, Any]]:
    for parts in _Parts(schema, holds).of(schema):
        if (one := _merge(parts, holds)) is not None:
            yield one


class _Parts:
    """Takes a schema apart into combinations of schemas without combining keywords."""

    def __init__(self, root: Schema, holds: bool):
        self.root, self.holds, self.left = root, holds, _VISITS
        """With `holds`, what the combinations would not hold to is refused."""

    def of(self, schema: Any, depth: int = 0) -> list[list[Schema]]:
        """Of all schemas in one of these, a call's arguments must be right for each."""
        self.left -= 1
        if depth > 10 or self.left < 0:
            raise _refused("$ref", "leads to itself, or to too many schemas")
        if not isinstance(schema, Mapping):
            return [] if schema is False else [[]]
        if "type" in schema and "object" not in (schema["type"], *list_of(schema, "type")):
            return []
        found: list[list[Schema]] = [[schema]]
        for group in self._groups(schema):
            options = [parts for one in group for parts in self.of(one, depth + 1)]
            found = [[*parts, *more] for parts in found for more in options]
            if len(found) > _MOST:
                raise _refused("anyOf", f"more than {_MOST} combinations")
        return found

    def _groups(self, schema: Schema) -> Iterator[list[Any]]:
        """Schemas of the same value; of several in a group one has to fit."""
        if isinstance(reference := schema.get("$ref"), str):
            if (found := target(self.root, reference)) is None:
                raise _refused("$ref", f"there is no {shown(reference)}")
            yield [found]
        for part in list_of(schema, "allOf"):
            yield [part]
        for keyword in ("anyOf", "oneOf"):
            if choices := list_of(schema, keyword):
                if self.holds and keyword == "oneOf" and not are_apart(choices, self.root):
                    raise _refused("oneOf", "arguments could fit several; use anyOf")
                yield choices


def _merge(parts: Sequence[Schema], holds: bool) -> dict[str, Any] | None:
    """The parameters that are right for all of `parts`; None where there is no such call."""
    required = {
        one: None for part in parts for one in list_of(part, "required") if isinstance(one, str)
    }
    names = {name: None for part in parts for name in properties_of(part)} | required
    properties: dict[str, Any] = {}
    for name in names:
        limits = [_limit(part, name) for part in parts]
        if False not in limits:
            properties[name] = _joined("allOf", [one for one in limits if one is not True])
        elif name in required:
            return None
    for part in parts if holds else ():
        _check(part, properties, len(required))
    return {"properties": properties, "required": list(required)}


def _limit(part: Schema, name: str) -> Any:
    """What a part says of a parameter: a schema, True or False."""
    limit = properties_of(part).get(name, part.get("additionalProperties", True))
    return limit if isinstance(limit, Mapping) and limit else limit is not False


def _joined(keyword: str, schemas: Sequence[Any]) -> Any:
    several = [one for index, one in enumerate(schemas) if one not in schemas[:index]]
    if keyword == "anyOf" and {} in several:
        return {}
    return {keyword: several} if len(several) > 1 else several[0] if several else {}


def _check(part: Schema, properties: Mapping[str, Any], required: int) -> None:
    """Refuses what `properties` and `required` alone do not hold to."""
    if part.get("patternProperties") and properties:
        raise _refused("patternProperties", "is not supported beside parameters with names")
    least, most = part.get("minProperties") or 0, part.get("maxProperties")
    if least > required or (isinstance(most, int) and most < len(properties)):
        raise _refused("minProperties and maxProperties", "are not supported here")
    for keyword in {"enum", "const"} & part.keys():
        raise _refused(keyword, "is not supported for all arguments together")


def _refused(keyword: str, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"the JSON schema of a function: {keyword}: {problem}")
