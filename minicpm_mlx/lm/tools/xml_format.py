"""Calls as XML: MiniCPM5."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from xml.sax.saxutils import unescape

from ...text.parameters import parameters_of, properties_of
from ...text.thinking import overlap
from .formats import (
    BlockText,
    Call,
    CallText,
    Literal,
    Schema,
    Steps,
    json_type,
    json_types,
    known,
)
from .growing_json import sound_json
from .python_literals import read_literal
from .xml_grammar import NAME, PARAM_END, SECTION_END, SECTION_START, XmlGrammar

_NAME = rf"""\s+name\s*=\s*(?P<quote>["'])(?P<name>{NAME})(?P=quote)\s*>"""
_HEAD, _PARAMETER = re.compile(f"<function{_NAME}"), re.compile(f"<param{_NAME}")
_ENTITY_START = re.compile(r"&[a-z]{0,3}\Z")
_SECTION = re.compile(r"<!\[CDATA\[((?:(?!\]\]>).)*)\]\]>", re.DOTALL)
_SECTIONS = re.compile(rf"\s*(?:{_SECTION.pattern}\s*)+", re.DOTALL)


class XmlToolFormat:
    """`<function name="..."><param name="...">...</param></function>`: MiniCPM 5."""

    opening, closing = "<function", "</function>"
    begins_tag = True
    before = after = ""

    def end(self, text: str) -> int:
        end = _find(text, self.closing, 0)
        return end if end < 0 else end + len(self.closing)

    def read(self, text: str, functions: Mapping[str, Schema]) -> list[Call]:
        head = _HEAD.match(text)
        if head is None or (name := head["name"]) not in functions:
            raise ValueError("no function of that name")
        properties = properties_of(parameters_of(functions[name]))
        arguments, at = {}, head.end()
        while param := _PARAMETER.search(text, at):
            if (end := _find(text, PARAM_END, param.end())) < 0:
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
        properties = properties_of(parameters_of(schema))
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
            for text in _value_steps(source, properties.get(param["name"], {}), schema):
                yield None if text is None else CallText(name, text)
            before = ", "

    def rules(self, rule: str, name: str, arguments: Schema, literal: Literal) -> str:
        return XmlGrammar(rule, arguments, literal).rules(name)


def _find(text: str, mark: str, at: int) -> int:
    """Where `mark` comes from `at` on, but not in a CDATA section; -1 if it does not."""
    while True:
        end = text.find(mark, at)
        section = text.find("<![CDATA[", at, end) if end >= 0 else -1
        if section < 0:
            return end
        if (at := text.find("]]>", section)) < 0:
            return -1


def _parse_value(inner: str, schema: Schema, root: Schema) -> Any:
    text = "".join(_SECTION.findall(inner)) if _SECTIONS.fullmatch(inner) else unescape(inner)
    types = json_types(schema, root)
    if types == {"string"}:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        if "string" in types:
            return text
        try:
            value = read_literal(text)  # as MiniCPM5's own template writes True and {'a': 1}
        except ValueError:
            return text
    kind = json_type(value)
    fits = kind in types or (kind == "integer" and "number" in types)
    return text if "string" in types and not fits else value


def _value_steps(source: BlockText, schema: Schema, root: Schema) -> Iterator[str | None]:
    """The JSON text of a parameter's value up to its end: text as it comes, others at once."""
    if json_types(schema, root) == {"string"}:
        yield '"'
        for text in _text_steps(source):
            yield text and json.dumps(text, ensure_ascii=False)[1:-1]
        yield '"'
        return
    while (end := _find(source.text, PARAM_END, 0)) < 0:
        yield None
    inner, source.text = source.text[:end], source.text[end + len(PARAM_END) :]
    yield sound_json(_parse_value(inner, schema, root))


def _text_steps(source: BlockText) -> Iterator[str | None]:
    """The text of a parameter, plain or in sections, up to its end."""
    within = False
    while True:
        marks = (SECTION_END,) if within else (PARAM_END, SECTION_START)
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
        if mark == PARAM_END:
            return
        within = within if not mark else mark == SECTION_START
        if not mark:
            yield None
