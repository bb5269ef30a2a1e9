"""The grammar of a call in Python whose arguments follow a JSON schema."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...arguments import shown
from ...errors import InvalidArgumentError
from ...text.parameters import alternatives, are_apart, list_of, properties_of
from ...text.python_tools import python_name, python_value
from ..structured.schema_check import NOTES, target, written
from .formats import Literal, Schema

_TEXT = r"""/"([^"\\\x00-\x1f\x7f]|\\["\\nt])*"/"""
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_TEXTS = ("pattern", "format", "minLength", "maxLength")
_ITEMS = ("items", "prefixItems", "minItems", "maxItems", "additionalItems")
_FIELDS = ("properties", "required", "additionalProperties", "patternProperties")
_KINDS = {
    "string": _TEXTS,
    "integer": _NUMBERS,
    "number": _NUMBERS,
    "boolean": (),
    "null": (),
    "array": _ITEMS,
    "object": (*_FIELDS, "minProperties", "maxProperties"),
}
"""Types, and the keywords that limit each."""
_COMBINING = ("$ref", "allOf", "anyOf", "oneOf", "enum", "const")
_OPTIONS = 400
"""Most items of a list that `minItems` and `maxItems` are spelled out for."""


class PythonGrammar:
    """Lark rules of a call: literals of Python in place of JSON, in the order of the schema.

    InvalidArgumentError for a schema that is malformed, or that asks for more than a grammar of
    Python's literals says.
    """

    def __init__(self, rule: str, schema: Schema, literal: Literal):
        written(schema)  # refuses what is unknown, too deep or malformed
        self.rule, self.schema, self.literal = rule, schema, literal
        self.made: list[str] = []
        self.references: dict[str, str] = {}
        """Rules by what they refer to."""

    def rules(self, name: str) -> str:
        """All rules; the first is a call of the function `name`."""
        calls = (
            f"{self.literal(name + '(')} {self._fields(one, python_name, '=')} {self.literal(')')}"
            for one in alternatives(self.schema)
        )
        return "\n".join([f"{self.rule}: {' | '.join(calls)}", *self.made])

    def _new(self, expression: str) -> str:
        """The name of a new rule."""
        name = f"{self.rule}_{len(self.made)}"
        self.made.append(f"{name}: {expression}")
        return name

    def _value(self, schema: Any) -> str:
        """The expression of a value."""
        if schema is True or schema == {}:
            return self._any()
        if not isinstance(schema, Mapping):
            raise _refused("a schema", f"expected an object, got {shown(schema)}")
        for keyword in _COMBINING:
            if keyword in schema:
                return self._combined(keyword, schema)
        types = schema.get("type") or [
            kind for kind, words in _KINDS.items() if any(word in schema for word in words)
        ]
        types = [types] if isinstance(types, str) else types
        if not types:
            return self._any()
        return _either(self._typed(kind, schema) for kind in types)

    def _combined(self, keyword: str, schema: Schema) -> str:
        value = schema[keyword]
        others = schema.keys() - NOTES - {keyword, "$defs", "definitions"}
        if keyword in ("enum", "const"):
            values = [value] if keyword == "const" else value
            kinds = schema.get("type")
            if others - {"type"} or not isinstance(values, list) or not values:
                raise _refused(keyword, "goes with no keyword but type")
            fitting = [item for item in values if kinds is None or _is_of(item, kinds)]
            if not fitting:
                raise _refused(keyword, f"no value is of type {shown(kinds)}")
            return _either(self.literal(python_value(item)) for item in fitting)
        if others - {"type"}:
            raise _refused(keyword, f"goes with no keyword beside it, got {shown(sorted(others))}")
        if keyword == "$ref":
            return self._reference(value)
        if not isinstance(value, list) or not value:
            raise _refused(keyword, "expected a list of schemas")
        if keyword == "allOf" and len(value) > 1:
            raise _refused(keyword, "several schemas for one value are not supported here")
        if keyword == "oneOf" and not are_apart(value, self.schema):
            raise _refused(keyword, "a value could fit several; use anyOf")
        return _either(self._value(inner) for inner in value)

    def _reference(self, reference: str) -> str:
        if reference not in self.references:
            name = f"{self.rule}_ref{len(self.references)}"
            self.references[reference] = name
            found = target(self.schema, reference)
            if found is None:
                raise _refused("$ref", f"there is no {shown(reference)}")
            self.made.append(f"{name}: {self._value(found)}")
        return self.references[reference]

    def _typed(self, kind: str, schema: Schema) -> str:
        if kind not in _KINDS:
            raise _refused("type", f"unknown type {shown(kind)}")
        limits = {word: schema[word] for word in _KINDS[kind] if word in schema}
        match kind:
            case "boolean":
                return '("True" | "False")'
            case "null":
                return '"None"'
            case "array":
                return self._list(schema)
            case "object":
                return self._object(schema)
        if kind == "string" and not limits:
            return _TEXT
        # A text or number of JSON is one of Python too.
        return f"%json {json.dumps({'type': kind, **limits})}"

    def _list(self, schema: Schema) -> str:
        first, rest = list_of(schema, "prefixItems"), schema.get("items", True)
        if "additionalItems" in schema or isinstance(rest, list):
            raise _refused("items", "use prefixItems for a list whose items differ")
        least, most = (schema.get(word) for word in ("minItems", "maxItems"))
        least = max(least if isinstance(least, int) else 0, len(first))
        if least > _OPTIONS or (isinstance(most, int) and (most > _OPTIONS or most < least)):
            raise _refused("minItems and maxItems", f"expected at most {_OPTIONS}, in order")
        if rest is False:
            most = len(first)
        if first:
            items = ' ", " '.join(self._value(item) for item in first)
            count = _times(max(least - len(first), 0), None if most is None else most - len(first))
            more = f'(", " {self._new(self._value(rest))}){count}' if count != "{0,0}" else ""
            return f'("[" {items} {more} "]")'
        if most == 0:
            return '"[]"'
        item = self._new(self._value(rest))
        count = _times(max(least - 1, 0), None if most is None else most - 1)
        items = f'{item} (", " {item}){count}'
        return f'("[" {items} "]")' if least else f'("[" ({items})? "]")'

    def _object(self, schema: Schema) -> str:
        return f'("{{" {self._fields(schema, json_text, ": ")} "}}")'

    def _fields(self, schema: Schema, named: Any, sign: str) -> str:
        """The named values of an object or a call, between commas."""
        if schema.get("patternProperties"):
            raise _refused("patternProperties", "is not supported here")
        required, properties = list_of(schema, "required"), dict(properties_of(schema))
        least, most = schema.get("minProperties") or 0, schema.get("maxProperties")
        if least > len(required) or (isinstance(most, int) and most < len(properties)):
            raise _refused("minProperties and maxProperties", "are not supported here")
        further = schema.get("additionalProperties", not properties)
        fields = [
            (f"{self.literal(named(key) + sign)} {self._value(value)}", key in required)
            for key, value in properties.items()
        ]
        if further is not False and sign == ": ":  # a call's own names are all there is
            if isinstance(most, int):
                raise _refused("maxProperties", "is not supported here")
            one = self._new(f'{_TEXT} ": " {self._value(further)}')
            fields.append((f'{one} (", " {one})*', False))
        return self._listed(fields)

    def _listed(self, fields: Sequence[tuple[str, bool]]) -> str:
        """Fields in order with commas between them; those that are not required may be left out."""
        at = next((i for i, (_, required) in enumerate(fields) if required), None)
        if at is None:
            following, options = "", []
            for field, _ in reversed(fields):
                rule = self._new(field)
                options.append(f"{rule} {following}")
                following = self._new(f'(", " {rule})? {following}')
            return f"({' | '.join(options)})?" if options else '""'
        parts = [f'({field} ", ")?' for field, _ in fields[:at]] + [fields[at][0]]
        parts += [
            f'", " {field}' if needed else f'(", " {field})?' for field, needed in fields[at + 1 :]
        ]
        return " ".join(parts)

    def _any(self) -> str:
        """Any literal."""
        if "" not in self.references:
            self.references[""] = name = f"{self.rule}_any"
            number = '%json {"type": "number"}'
            self.made += [
                f'{name}: {_TEXT} | {number} | "True" | "False" | "None" | {name}_list '
                f"| {name}_object",
                f'{name}_list: "[" ({name} (", " {name})*)? "]"',
                f'{name}_object: "{{" ({name}_item (", " {name}_item)*)? "}}"',
                f'{name}_item: {_TEXT} ": " {name}',
            ]
        return self.references[""]


def json_text(text: str) -> str:
    """A text as JSON and Python both write it."""
    return json.dumps(text, ensure_ascii=False)


def _either(expressions: Iterable[str]) -> str:
    return f"({' | '.join(expressions)})"


def _times(least: int, most: int | None) -> str:
    return "*" if not least and most is None else f"{{{least},{'' if most is None else most}}}"


def _is_of(value: Any, kinds: Any) -> bool:
    names = {bool: "boolean", type(None): "null", int: "integer", float: "number"}
    names |= {str: "string", list: "array", dict: "object"}
    kind = names[type(value)]
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return kind in kinds or (kind == "integer" and "number" in kinds)


def _refused(keyword: str, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"the JSON schema of a call in Python: {keyword}: {problem}")
