"""The grammar of a call in MiniCPM5's XML whose arguments follow a JSON schema."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

from ...arguments import is_whole, shown
from ...errors import InvalidArgumentError
from ...text.parameters import alternatives, properties_of
from ..structured.grammar import library
from ..structured.schema_check import NOTES, target, written
from .formats import Literal, Schema, json_types

NAME = r"""[^"'<>&\n]*"""
"""Names of functions and parameters: a model does not escape them."""
PARAM_END, SECTION_START, SECTION_END = "</param>", "<![CDATA[", "]]>"

_ANY = "/(?s:.*)/"
_MARKS = r"/(?s:.*)(<!\[CDATA\[|<\/param>|<\/function>)(?s:.*)/"
"""What text outside of a section must not have."""
_SECTION = r"/([^\]]|\][^\]]|\]\]+[^\]>])*\]*/"
"""Text without the end of a section."""
_DATE = "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIME = r"([01][0-9]|2[0-3])(:[0-5][0-9]){2}(\.[0-9]{1,9})?"
_ZONE = "(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL}){{0,8}}"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_HEX = "[0-9A-Fa-f]"
_DAYS = "([0-9]+Y)?([0-9]+M)?[0-9]+D"
_HOURS = "([0-9]+H)?([0-9]+M)?[0-9]+S"
_FORMATS = {
    "date": _DATE,
    "time": _TIME + _ZONE,
    "date-time": f"{_DATE}T{_TIME}{_ZONE}",
    "duration": f"P({_DAYS}(T{_HOURS})?|T{_HOURS}|[0-9]+[WYM]|T[0-9]+[HM])",
    "email": rf"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@{_HOST}",
    "hostname": _HOST,
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "ipv6": f"(({_HEX}{{1,4}}:){{7}}{_HEX}{{1,4}}|({_HEX}{{1,4}}(:{_HEX}{{1,4}}){{0,2}})?::"
    f"({_HEX}{{1,4}}(:{_HEX}{{1,4}}){{0,2}})?)",
    "uuid": f"{_HEX}{{8}}(-{_HEX}{{4}}){{3}}-{_HEX}{{12}}",
    "uri": r"[A-Za-z][A-Za-z0-9+.-]*:([A-Za-z0-9._~:/?#@!$&'()*+,;=\[\]-]|%[0-9A-Fa-f]{2})+",
}
"""The shapes of texts, as those of JSON have them."""


class XmlGrammar:
    """Lark rules of a call, its parameters in the order of the schema.

    InvalidArgumentError for a schema that is malformed, or that asks for more of a text than a
    grammar says.
    """

    def __init__(self, rule: str, schema: Schema, literal: Literal):
        written(schema)  # refuses what is unknown, too deep or malformed
        self.rule, self.schema, self.literal = rule, schema, literal
        self.made: list[str] = []
        self.definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        """What a $ref may point at."""

    def rules(self, name: str) -> str:
        """All rules; the first is a call of the function `name`."""
        calls = " | ".join(self._call(name, one) for one in alternatives(self.schema))
        return "\n".join([f"{self.rule}: {calls}", *self.made])

    def _call(self, name: str, schema: Schema) -> str:
        parts = [self.literal(f'<function name="{name}">')]
        for key, value in properties_of(schema).items():
            if not re.fullmatch(NAME, key):
                raise InvalidArgumentError(
                    f"parameter {shown(key)}: expected a name without quotes, <, > or &"
                )
            head = self.literal(f'<param name="{key}">')
            param = f"{head} {self._value(value, key)}"
            parts.append(param if key in schema["required"] else f"({param})?")
        return " ".join([*parts, self.literal("</function>")])

    def _value(self, schema: Any, key: str) -> str:
        """A value and the end of its parameter."""
        end = self.literal(PARAM_END)
        if json_types(schema, self.definitions) != {"string"}:
            whole = {**schema, **self.definitions} if isinstance(schema, Mapping) else schema
            return f"%json {json.dumps(whole)} {end}"
        limits = _Text(self.definitions, key).terminal(schema)
        # A complement of limited text would not end where it may: llguidance 1.9.
        plain = f"{_ANY} & ~{_MARKS}" if limits == _ANY else f"{limits} & /[^<&]*/"
        section = f'"{SECTION_START}" ({limits} & {_SECTION}) "{SECTION_END}"'
        if end == json.dumps(PARAM_END):
            # Within one terminal: of text and mark apart, the text would take part of the mark.
            return self._terminal(f"(({plain}) | {section}) {end}")
        return f"{self._terminal(f'({plain}) | {section}')} {end}"

    def _terminal(self, expression: str) -> str:
        """The name of a terminal, which many parameters of many calls may have."""
        name = f"TEXT_{sha256(expression.encode()).hexdigest()[:16].upper()}"
        self.made.append(f"{name}: {expression}")
        return name


class _Text:
    """What a schema allows of a text, as an expression of a terminal."""

    def __init__(self, definitions: Schema, key: str):
        self.definitions, self.key = definitions, key

    def terminal(self, schema: Any, depth: int = 0) -> str:
        if not isinstance(schema, Mapping):
            return _ANY
        if depth > 20:
            raise self._refused("$ref", "leads to itself")
        limits = [
            limit
            for keyword, value in schema.items()
            if keyword not in NOTES
            for limit in self._limits(keyword, value, depth)
        ]
        if sizes := {"minLength", "maxLength"} & schema.keys():
            for size in sizes:
                if not is_whole(schema[size]) or schema[size] < 0:
                    raise self._refused(
                        size, f"expected a number of characters, got {shown(schema[size])}"
                    )
            least, most = schema.get("minLength", 0), schema.get("maxLength", "")
            limits.append(f"/(?s:.{{{least},{most}}})/")
        return f"({' & '.join(limits)})" if limits else _ANY

    def _limits(self, keyword: str, value: Any, depth: int) -> list[str]:
        if keyword in ("enum", "anyOf", "oneOf", "allOf") and not isinstance(value, list):
            raise self._refused(keyword, f"expected a list, got {shown(value)}")
        match keyword:
            case "$ref":
                return [self.terminal(target(self.definitions, value), depth + 1)]
            case "enum" | "const":
                values = value if keyword == "enum" else [value]
                texts = [one for one in values if isinstance(one, str)]
                if not texts:
                    raise self._refused(keyword, "expected a text among the values")
                return [_either(json.dumps(text, ensure_ascii=False) for text in texts)]
            case "anyOf" | "oneOf" | "allOf":
                inner = [self.terminal(part, depth + 1) for part in value]
                if keyword == "oneOf" and not all(_is_choice(part) for part in value):
                    raise self._refused("oneOf", "a text could fit several; use anyOf")
                return inner if keyword == "allOf" else [_either(inner)]
            case "pattern":
                if not isinstance(value, str):
                    raise self._refused("pattern", f"expected text, got {shown(value)}")
                return [self._pattern(value)]
            case "format":
                if not isinstance(value, str) or value not in _FORMATS:
                    known = ", ".join(_FORMATS)
                    raise self._refused("format", f"expected one of {known}, got {shown(value)}")
                return [f"/{library().regex_to_lark(_FORMATS[value], '')}/"]
        return []

    def _pattern(self, pattern: str) -> str:
        """A text that has the pattern somewhere, as JSON schemas mean it."""
        begins, ends = pattern.startswith("^"), re.search(r"(?<!\\)(\\\\)*\$\Z", pattern)
        inner = pattern[begins : len(pattern) - bool(ends)]
        if (begins or ends) and _has_choice(inner):
            raise self._refused("pattern", "put what is between ^ and $ in brackets, (a|b)")
        if inner.endswith("\\") and (len(inner) - len(inner.rstrip("\\"))) % 2:
            raise self._refused("pattern", "ends with a backslash that escapes nothing")
        body = library().regex_to_lark(inner, "dw")
        before, after = "" if begins else "(?s:.*)", "" if ends else "(?s:.*)"
        return f"/{before}({body}){after}/"

    def _refused(self, keyword: str, problem: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"the JSON schema of the parameter {shown(self.key)}: {keyword}: {problem}"
        )


def _either(expressions: Iterable[str]) -> str:
    return f"({' | '.join(expressions)})"


def _is_choice(schema: Any) -> bool:
    return isinstance(schema, Mapping) and ("const" in schema or "enum" in schema)


def _has_choice(pattern: str) -> bool:
    """Whether `|` parts a regular expression outside of its brackets."""
    depth = 0
    for word in re.findall(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|[()|]", pattern, re.DOTALL):
        depth += (word == "(") - (word == ")")
        if word == "|" and not depth:
            return True
    return False
