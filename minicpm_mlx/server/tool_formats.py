"""How models write that they call a function: the forms that chat templates teach them."""

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
"""Text to the Lark expression that stands for it."""


class Form(Protocol):
    """One way to write calls."""

    opening: str
    """What a call begins with."""
    closing: str
    """What it ends with."""

    def end(self, text: str) -> int:
        """Where the call that `text` begins with ends; -1 where it does not yet."""
        ...

    def read(self, text: str, functions: Mapping[str, Schema]) -> tuple[str, dict[str, Any]]:
        """Name and arguments of a call; ValueError for what is none of `functions`."""
        ...

    def rule(self, name: str, arguments: Schema, literal: Literal) -> str:
        """The Lark expression of a call; InvalidArgumentError where there can be none."""
        ...


class JsonForm:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen and many others."""

    opening, closing = "<tool_call>", "</tool_call>"

    def end(self, text: str) -> int:
        at = text.find(self.closing)
        return at if at < 0 else at + len(self.closing)

    def read(self, text: str, functions: Mapping[str, Schema]) -> tuple[str, dict[str, Any]]:
        call = _object(json.loads(text[len(self.opening) :].removesuffix(self.closing)))
        if call.get("name") not in functions:
            raise ValueError(f"no function {call.get('name')!r}")
        return call["name"], _object(call.get("arguments", {}))

    def rule(self, name: str, arguments: Schema, literal: Literal) -> str:
        head = f'{self.opening}\n{{"name": {json.dumps(name)}, "arguments": '
        return f"{literal(head)} {_json(arguments)} {literal('}' + chr(10) + self.closing)}"


class XmlForm:
    """`<function name="..."><param name="...">...</param></function>`: MiniCPM 5."""

    opening, closing = "<function", "</function>"

    def end(self, text: str) -> int:
        found = _CALL.match(text)
        return found.end() if found else -1

    def read(self, text: str, functions: Mapping[str, Schema]) -> tuple[str, dict[str, Any]]:
        found = _CALL.fullmatch(text)
        if found is None or (name := found["name"]) not in functions:
            raise ValueError("no function of that name")
        properties = _properties(functions[name])
        arguments = {
            one["name"]: _value(one, properties.get(one["name"], {}))
            for one in _PARAMETER.finditer(found["inner"])
        }
        return name, arguments

    def rule(self, name: str, arguments: Schema, literal: Literal) -> str:
        needed = _items(arguments, "required")
        parts = [literal(f'<function name="{name}">')]
        for key, schema in _properties(arguments).items():
            if not re.fullmatch(_PLAIN, key):
                raise InvalidArgumentError(f"parameter {shown(key)}: expected a name without marks")
            head, tail = literal(f'<param name="{key}">'), literal("</param>")
            one = f"{head} {_text_or_json(schema, literal)} {tail}"
            parts.append(one if key in needed else f"({one})?")
        return " ".join([*parts, literal(self.closing)])


FORMS: Sequence[Form] = (JsonForm(), XmlForm())


def form_of(template: str) -> Form | None:
    """The form that a chat template teaches, by the marks that it writes."""
    return next((form for form in FORMS if form.opening in template), None)


def _object(value: Any) -> dict[str, Any]:
    """An object, or the JSON text of one, as some models write arguments."""
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise ValueError("a call and its arguments are objects")
    return found


def _json(schema: Schema) -> str:
    """Lark's way to say: JSON that follows `schema`, an object where that does not say."""
    return f"%json {json.dumps({'type': 'object', **schema})}"


# A section of plain text may hold whatever looks like a mark.
_CDATA = r"<!\[CDATA\[.*?\]\]>"
_INNER = rf"(?:{_CDATA}|(?!<!\[CDATA\[).)*?"
_PLAIN = r"""[^"'<>&\n]*"""
_NAME = rf"""\s+name\s*=\s*(?P<quote>["'])(?P<name>{_PLAIN})(?P=quote)\s*"""
_CALL = re.compile(rf"<function{_NAME}>(?P<inner>{_INNER})</function>", re.DOTALL)
_PARAMETER = re.compile(rf"<param{_NAME}>(?P<inner>{_INNER})</param>", re.DOTALL)


def _properties(schema: Schema) -> Mapping[str, Schema]:
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def _items(schema: Schema, name: str) -> list[Any]:
    found = schema.get(name)
    return found if isinstance(found, list) else []


def _is_text(schema: object) -> bool:
    return isinstance(schema, Mapping) and schema.get("type", "string") == "string"


def _value(found: re.Match[str], schema: Schema) -> Any:
    inner = found["inner"]
    section = re.fullmatch(r"\s*<!\[CDATA\[(.*?)\]\]>\s*", inner, re.DOTALL)
    text = section[1] if section else unescape(inner)
    if _is_text(schema):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _text_or_json(schema: Schema, literal: Literal) -> str:
    if not _is_text(schema):
        return f"%json {json.dumps(schema)}"
    if choices := _items(schema, "enum"):
        return "(" + " | ".join(literal(escape(str(choice))) for choice in choices) + ")"
    return rf"(/[^<&\]]+/ | {literal('<![CDATA[')} /[^\]]*/ {literal(']]>')})"
