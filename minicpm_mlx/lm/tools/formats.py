"""The forms in which models write tool calls, as their chat templates define them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ...text.parameters import list_of
from ..structured.schema_check import target
from .growing_json import GrowingJson

Schema = Mapping[str, Any]
"""A JSON schema: that of a function's arguments, or of one of them."""

Literal = Callable[[str], str]
"""Turns text into a Lark expression for it."""

_DEEP = 20
"""Most schemas in each other, along references, in which the type of a value is looked for."""


Call = tuple[str, dict[str, Any]]
"""Name and arguments."""


@dataclass
class BlockText:
    """The text of a block that is not read yet; more is added as it comes."""

    text: str


@dataclass(frozen=True)
class CallText:
    """The next part of a call."""

    name: str
    arguments: str
    """More of the JSON text, which only grows."""
    ends: bool = False


Steps = Iterator[CallText | None]
"""None where more text is needed. The source is left as it is before the first part."""


class ToolFormat(Protocol):
    """One way to write tool calls, a single one or several in a block."""

    opening: str
    """The text at the start of a block."""
    closing: str
    """The text at its end."""
    begins_tag: bool
    """The opening text is the beginning of a tag: other tags may begin so, `<functional>` as
    `<function`. White space comes next in a call."""
    before: str
    """The text before the calls of a reply that is nothing else."""
    after: str
    """The text after them."""

    def end(self, text: str) -> int:
        """The end of the block at the start of `text`; -1 if it is not complete."""
        ...

    def read(self, text: str, functions: Mapping[str, Schema]) -> list[Call]:
        """The calls of a block; ValueError if one calls none of `functions`."""
        ...

    def steps(self, source: BlockText, functions: Mapping[str, Schema]) -> Steps:
        """The calls of a block that the grammar of `rules` holds valid, while they are written.

        ValueError, before the first part, for a block in another layout.
        """
        ...

    def rules(self, rule: str, name: str, arguments: Schema, literal: Literal) -> str:
        """The Lark rules of a call, `rule` the first; InvalidArgumentError if there are none."""
        ...


class JsonToolFormat:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen and many others."""

    opening, closing = "<tool_call>", "</tool_call>"
    begins_tag = False
    before = after = ""

    def end(self, text: str) -> int:
        if (start := text.find(self.closing)) < 0:
            return -1
        call = text[len(self.opening) :].lstrip()
        try:  # a text in it may have the mark
            _, at = _DECODER.raw_decode(call)
        except json.JSONDecodeError as error:
            if error.msg.startswith("Unterminated string"):
                return -1
            # A line that ends within a text is no JSON: the mark before it counts.
            at = 0 if error.msg.startswith("Invalid control") else error.pos
        except (ValueError, RecursionError):
            at = 0  # beyond the limits of Python's reader
        start = text.find(self.closing, max(start, len(text) - len(call) + at))
        return start if start < 0 else start + len(self.closing)

    def read(self, text: str, functions: Mapping[str, Schema]) -> list[Call]:
        call = _parse_object(json.loads(text[len(self.opening) :].removesuffix(self.closing)))
        if not isinstance(name := call.get("name"), str) or name not in functions:
            raise ValueError(f"no function {name!r}")
        return [(name, _parse_object(call.get("arguments") or {}))]

    def steps(self, source: BlockText, functions: Mapping[str, Schema]) -> Steps:
        while (head := _JSON_HEAD.match(source.text)) is None:
            yield None
        name = known(json.loads(head["name"]), functions)
        source.text = source.text[head.end() :]
        arguments = GrowingJson()
        while not arguments.ended:
            text, source.text = source.text, ""
            if grown := arguments.add(text):
                yield CallText(name, grown, arguments.ended)
            if not arguments.ended:
                yield None
        source.text = arguments.rest
        while (end := source.text.find(self.closing)) < 0:
            yield None
        source.text = source.text[end + len(self.closing) :]

    def rules(self, rule: str, name: str, arguments: Schema, literal: Literal) -> str:
        head = f'{self.opening}\n{{"name": {json.dumps(name)}, "arguments": '
        schema = json.dumps(arguments)
        return f"{rule}: {literal(head)} %json {schema} {literal('}' + chr(10) + self.closing)}"


def known(name: str, functions: Container[str]) -> str:
    """`name`; ValueError if it is none of `functions`."""
    if name not in functions:
        raise ValueError(f"no function {name!r}")
    return name


def _parse_object(value: Any) -> dict[str, Any]:
    """An object, or the JSON text of one, as some models write arguments."""
    parsed = json.loads(value) if isinstance(value, str) else value
    if not isinstance(parsed, dict):
        raise ValueError("a call and its arguments are objects")
    return parsed


_DECODER = json.JSONDecoder()
_JSON_HEAD = re.compile(
    r'<tool_call>\s*\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)'
)


def json_types(schema: object, root: Schema, depth: int = 0) -> set[str]:
    """The JSON types that a value may have, as far as the schema says."""
    if not isinstance(schema, Mapping) or depth > _DEEP:
        return set()
    if isinstance(stated := schema.get("type"), str):
        return {stated}
    if isinstance(stated, list):
        return {kind for kind in stated if isinstance(kind, str)}
    values = list_of(schema, "enum") + ([schema["const"]] if "const" in schema else [])
    if values:
        return {json_type(value) for value in values}
    inner = [part for key in ("anyOf", "oneOf", "allOf") for part in list_of(schema, key)]
    if isinstance(reference := schema.get("$ref"), str):
        inner.append(target(root, reference))
    if inner:
        return {kind for part in inner for kind in json_types(part, root, depth + 1)}
    return {"object"} if "properties" in schema else {"array"} if "items" in schema else {"string"}


def json_type(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return "null" if value is None else "boolean"
    kinds = {int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "")
