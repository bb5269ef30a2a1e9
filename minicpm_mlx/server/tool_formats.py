"""The forms in which models write tool calls, as their chat templates define them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol
from xml.sax.saxutils import escape, unescape

from ..arguments import shown
from ..errors import InvalidArgumentError

Schema = Mapping[str, Any]
"""A JSON schema: that of a function's arguments, or of one of them."""

Literal = Callable[[str], str]
"""Turns text into a Lark expression for it."""


class ToolFormat(Protocol):
    """One way to write tool calls."""

    opening: str
    """The text at the start of a call."""
    closing: str
    """The text at its end."""

    def end(self, text: str) -> int:
        """The end of the call at the start of `text`; -1 if it is not complete."""
        ...

    def read(self, text: str, functions: Mapping[str, Schema]) -> tuple[str, dict[str, Any]]:
        """Name and arguments of a call; ValueError if it calls none of `functions`."""
        ...

    def rule(self, name: str, arguments: Schema, literal: Literal) -> str:
        """The Lark expression of a call; InvalidArgumentError if there is none."""
        ...


class JsonToolFormat:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen and many others."""

    opening, closing = "<tool_call>", "</tool_call>"

    def end(self, text: str) -> int:
        start = text.find(self.closing)
        return start if start < 0 else start + len(self.closing)

    def read(self, text: str, functions: Mapping[str, Schema]) -> tuple[str, dict[str, Any]]:
        call = _parse_object(json.loads(text[len(self.opening) :].removesuffix(self.closing)))
        if call.get("name") not in functions:
            raise ValueError(f"no function {call.get('name')!r}")
        return call["name"], _parse_object(call.get("arguments") or {})

    def rule(self, name: str, arguments: Schema, literal: Literal) -> str:
        head = f'{self.opening}\n{{"name": {json.dumps(name)}, "arguments": '
        schema = json.dumps(arguments)
        return f"{literal(head)} %json {schema} {literal('}' + chr(10) + self.closing)}"


class XmlToolFormat:
    """`<function name="..."><param name="...">...</param></function>`: MiniCPM 5."""

    opening, closing = "<function", "</function>"

    def end(self, text: str) -> int:
        match = _CALL.match(text)
        return match.end() if match else -1

    def read(self, text: str, functions: Mapping[str, Schema]) -> tuple[str, dict[str, Any]]:
        match = _CALL.fullmatch(text)
        if match is None or (name := match["name"]) not in functions:
            raise ValueError("no function of that name")
        properties = _properties(functions[name])
        arguments = {
            param["name"]: _parse_value(param["inner"], properties.get(param["name"], {}))
            for param in _PARAMETER.finditer(match["inner"])
        }
        return name, arguments

    def rule(self, name: str, arguments: Schema, literal: Literal) -> str:
        required = _list_item(arguments, "required")
        parts = [literal(f'<function name="{name}">')]
        definitions = {key: arguments[key] for key in ("$defs", "definitions") if key in arguments}
        for key, schema in _properties(arguments).items():
            if not re.fullmatch(_PLAIN, key):
                raise InvalidArgumentError(
                    f"parameter {shown(key)}: expected a name without quotes, <, > or &"
                )
            head, tail = literal(f'<param name="{key}">'), literal("</param>")
            param = f"{head} {_value_rule(schema, definitions, literal)} {tail}"
            parts.append(param if key in required else f"({param})?")
        return " ".join([*parts, literal(self.closing)])


TOOL_FORMATS: Sequence[ToolFormat] = (JsonToolFormat(), XmlToolFormat())


def detect_tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template uses, found by the text that opens a call."""
    return next((form for form in TOOL_FORMATS if form.opening in template), None)


def _parse_object(value: Any) -> dict[str, Any]:
    """An object, or the JSON text of one, as some models write arguments."""
    parsed = json.loads(value) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        raise ValueError("a call and its arguments are objects")
    return parsed


# A CDATA section may hold text that looks like a tag.
_CDATA = r"<!\[CDATA\[.*?\]\]>"
_INNER = rf"(?:{_CDATA}|(?!<!\[CDATA\[).)*?"
_PLAIN = r"""[^"'<>&\n]*"""
_NAME = rf"""\s+name\s*=\s*(?P<quote>["'])(?P<name>{_PLAIN})(?P=quote)\s*"""
_CALL = re.compile(rf"<function{_NAME}>(?P<inner>{_INNER})</function>", re.DOTALL)
_PARAMETER = re.compile(rf"<param{_NAME}>(?P<inner>{_INNER})</param>", re.DOTALL)


def _properties(schema: Schema) -> Mapping[str, Schema]:
    properties = schema.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def _list_item(schema: Schema, name: str) -> list[Any]:
    items = schema.get(name)
    return items if isinstance(items, list) else []


def _is_text(schema: object) -> bool:
    return isinstance(schema, Mapping) and schema.get("type", "string") == "string"


def _parse_value(inner: str, schema: Schema) -> Any:
    section = re.fullmatch(r"\s*<!\[CDATA\[(.*?)\]\]>\s*", inner, re.DOTALL)
    text = section[1] if section else unescape(inner)
    if _is_text(schema):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _value_rule(schema: Schema, definitions: Schema, literal: Literal) -> str:
    """`definitions` are what a $ref in `schema` may point at."""
    if not _is_text(schema):
        whole = {**schema, **definitions} if isinstance(schema, Mapping) else schema
        return f"%json {json.dumps(whole)}"
    if choices := _list_item(schema, "enum"):
        return "(" + " | ".join(literal(escape(str(choice))) for choice in choices) + ")"
    return rf"(/[^<&\]]+/ | {literal('<![CDATA[')} /[^\]]*/ {literal(']]>')})"
