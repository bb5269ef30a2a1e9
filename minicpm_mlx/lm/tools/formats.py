"""The forms in which models write tool calls, as their chat templates define them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from xml.sax.saxutils import escape, unescape

from ...arguments import shown
from ...errors import InvalidArgumentError
from ...text.thinking import overlap
from ..structured.schema_check import target
from .growing_json import GrowingJson, sound_json

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
    before = after = ""

    def end(self, text: str) -> int:
        start = text.find(self.closing)
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


class XmlToolFormat:
    """`<function name="..."><param name="...">...</param></function>`: MiniCPM 5."""

    opening, closing = "<function", "</function>"
    before = after = ""

    def end(self, text: str) -> int:
        end = _find(text, self.closing, 0)
        return end if end < 0 else end + len(self.closing)

    def read(self, text: str, functions: Mapping[str, Schema]) -> list[Call]:
        head = _HEAD.match(text)
        if head is None or (name := head["name"]) not in functions:
            raise ValueError("no function of that name")
        properties = properties_of(functions[name])
        arguments, at = {}, head.end()
        while param := _PARAMETER.search(text, at):
            if (end := _find(text, "</param>", param.end())) < 0:
                raise ValueError("a parameter has no end")
            schema, inner = properties.get(param["name"], {}), text[param.end() : end]
            arguments[param["name"]] = _parse_value(inner, schema, functions[name])
            at = end
        return [(name, arguments)]

    def steps(self, source: BlockText, functions: Mapping[str, Schema]) -> Steps:
        while (head := _HEAD.match(source.text)) is None:
            yield None
        name = known(head["name"], functions)
        schema, before = functions[name], "{"
        source.text = source.text[head.end() :]
        yield CallText(name, before)
        while True:
            source.text = source.text.lstrip()
            if source.text.startswith(self.closing):
                source.text = source.text[len(self.closing) :]
                yield CallText(name, "}", ends=True)
                return
            if (param := _PARAMETER.match(source.text)) is None:
                yield None
                continue
            source.text = source.text[param.end() :]
            yield CallText(name, f"{before.strip('{')}{json.dumps(param['name'])}: ")
            for text in _value_steps(source, properties_of(schema).get(param["name"], {}), schema):
                yield None if text is None else CallText(name, text)
            before = ", "

    def rules(self, rule: str, name: str, arguments: Schema, literal: Literal) -> str:
        required = list_of(arguments, "required")
        parts = [literal(f'<function name="{name}">')]
        definitions = {key: arguments[key] for key in ("$defs", "definitions") if key in arguments}
        for key, schema in properties_of(arguments).items():
            if not re.fullmatch(_PLAIN, key):
                raise InvalidArgumentError(
                    f"parameter {shown(key)}: expected a name without quotes, <, > or &"
                )
            head, tail = literal(f'<param name="{key}">'), literal("</param>")
            param = f"{head} {_value_rule(schema, definitions, literal)} {tail}"
            parts.append(param if key in required else f"({param})?")
        return " ".join([f"{rule}:", *parts, literal(self.closing)])


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


_JSON_HEAD = re.compile(
    r'<tool_call>\s*\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)'
)
_PLAIN = r"""[^"'<>&\n]*"""
_NAME = rf"""\s+name\s*=\s*(?P<quote>["'])(?P<name>{_PLAIN})(?P=quote)\s*>"""
_HEAD, _PARAMETER = re.compile(f"<function{_NAME}"), re.compile(f"<param{_NAME}")
_ENTITY_START = re.compile(r"&[a-z]{0,3}\Z")
_SECTION = re.compile(r"<!\[CDATA\[((?:(?!\]\]>).)*)\]\]>", re.DOTALL)
_SECTIONS = re.compile(rf"\s*(?:{_SECTION.pattern}\s*)+", re.DOTALL)


def _find(text: str, mark: str, at: int) -> int:
    """Where `mark` comes from `at` on, but not in a CDATA section; -1 if it does not."""
    while True:
        end = text.find(mark, at)
        section = text.find("<![CDATA[", at, end) if end >= 0 else -1
        if section < 0:
            return end
        if (at := text.find("]]>", section)) < 0:
            return -1


def properties_of(schema: Schema) -> Mapping[str, Schema]:
    properties = schema.get("properties")
    return properties if isinstance(properties, Mapping) else {}


def list_of(schema: Schema, name: str) -> list[Any]:
    items = schema.get(name)
    return items if isinstance(items, list) else []


def _types(schema: object, root: Schema, depth: int = 0) -> set[str]:
    """The JSON types that a value may have, as far as the schema says."""
    if not isinstance(schema, Mapping) or depth > _DEEP:
        return set()
    if isinstance(stated := schema.get("type"), str):
        return {stated}
    if isinstance(stated, list):
        return {kind for kind in stated if isinstance(kind, str)}
    values = list_of(schema, "enum") + ([schema["const"]] if "const" in schema else [])
    if values:
        return {_type(value) for value in values}
    inner = [part for key in ("anyOf", "oneOf", "allOf") for part in list_of(schema, key)]
    if isinstance(reference := schema.get("$ref"), str):
        inner.append(target(root, reference))
    if inner:
        return {kind for part in inner for kind in _types(part, root, depth + 1)}
    return {"object"} if "properties" in schema else {"array"} if "items" in schema else {"string"}


def _type(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return "null" if value is None else "boolean"
    kinds = {int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "")


def _parse_value(inner: str, schema: Schema, root: Schema) -> Any:
    text = "".join(_SECTION.findall(inner)) if _SECTIONS.fullmatch(inner) else unescape(inner)
    types = _types(schema, root)
    if types == {"string"}:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    kind = _type(value)
    fits = kind in types or (kind == "integer" and "number" in types)
    return text if "string" in types and not fits else value


_PARAM_END, _SECTION_START, _SECTION_END = "</param>", "<![CDATA[", "]]>"


def _value_steps(source: BlockText, schema: Schema, root: Schema) -> Iterator[str | None]:
    """The JSON text of a parameter's value up to its end: text as it comes, others at once."""
    if _types(schema, root) == {"string"}:
        yield '"'
        for text in _text_steps(source):
            yield text and json.dumps(text, ensure_ascii=False)[1:-1]
        yield '"'
        return
    while (end := _find(source.text, _PARAM_END, 0)) < 0:
        yield None
    inner, source.text = source.text[:end], source.text[end + len(_PARAM_END) :]
    yield sound_json(_parse_value(inner, schema, root))


def _text_steps(source: BlockText) -> Iterator[str | None]:
    """The text of a parameter, plain or in sections, up to its end."""
    within = False
    while True:
        marks = (_SECTION_END,) if within else (_PARAM_END, _SECTION_START)
        found = [(at, mark) for mark in marks if (at := source.text.find(mark)) >= 0]
        at, mark = min(found, default=(-1, ""))
        if not mark:
            held = max(overlap(source.text, part) for part in marks)
            if not within and (begun := _ENTITY_START.search(source.text)):
                held = max(held, len(source.text) - begun.start())
            at = len(source.text) - held
        text, source.text = source.text[:at], source.text[at + len(mark) :]
        if text := text if within else unescape(text):
            yield text
        if mark == _PARAM_END:
            return
        within = within if not mark else mark == _SECTION_START
        if not mark:
            yield None


def _value_rule(schema: Schema, definitions: Schema, literal: Literal) -> str:
    """`definitions` are what a $ref in `schema` may point at."""
    if _types(schema, definitions) != {"string"}:
        whole = {**schema, **definitions} if isinstance(schema, Mapping) else schema
        return f"%json {json.dumps(whole)}"
    if choices := list_of(schema, "enum") or ([schema["const"]] if "const" in schema else []):
        return "(" + " | ".join(literal(escape(str(choice))) for choice in choices) + ")"
    least, most = (schema.get(key) for key in ("minLength", "maxLength"))
    if isinstance(least, int) or isinstance(most, int):
        return f"/[^<&\\]]{{{least or 0},{'' if most is None else most}}}/"
    return rf"(/[^<&\]]+/ | {literal('<![CDATA[')} /[^\]]*/ {literal(']]>')})"
