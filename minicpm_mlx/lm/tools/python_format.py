"""Calls as Python: MiniCPM3, 4 and 4.1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...text.python_tools import CLOSING, OPENING, python_name
from .formats import Call, Literal, Schema, properties_of
from .python_grammar import PythonGrammar
from .python_literals import LENGTH, PythonCall, is_within_string, read_calls

_FENCE = re.compile(r"\s*```\w*[ \t]*\n(?P<source>.*?)\n?[ \t]*```\s*", re.DOTALL)


class PythonToolFormat:
    """A fenced block of calls, one a line, between marks: `f(a="x", b=2)`.

    Names that Python does not take are written as `python_name` has them.
    """

    opening, closing = OPENING, CLOSING
    before, after = f"{OPENING}\n```python\n", f"\n```\n{CLOSING}"

    def end(self, text: str) -> int:
        at = 0
        while (start := text.find(self.closing, at)) >= 0:
            at = start + len(self.closing)
            if at > LENGTH or not is_within_string(_source(text[len(self.opening) : start])):
                return at
        return -1

    def read(self, text: str, functions: Mapping[str, Schema]) -> list[Call]:
        source = _source(text[len(self.opening) :].removesuffix(self.closing))
        names = {python_name(name): name for name in functions} | {name: name for name in functions}
        calls = []
        for call in read_calls(source):
            if call.name not in names:
                raise ValueError(f"no function {call.name!r}")
            name = names[call.name]
            calls.append((name, _arguments(call, functions[name])))
        if not calls:
            raise ValueError("no call")
        return calls

    def rules(self, rule: str, name: str, arguments: Schema, literal: Literal) -> str:
        return PythonGrammar(rule, arguments, literal).rules(python_name(name))


def _source(text: str) -> str:
    """The Python text between the marks, without the fence."""
    if fenced := _FENCE.fullmatch(text):
        return fenced["source"]
    return re.sub(r"^\s*```\w*[ \t]*\n", "", text, count=1)


def _arguments(call: PythonCall, schema: Schema) -> dict[str, Any]:
    """By the names of the schema; values without a name go to its properties in order."""
    own = list(properties_of(schema))
    names = {python_name(name): name for name in own} | {name: name for name in own}
    if len(call.positional) > len(own):
        raise ValueError("more values than the function has parameters")
    arguments = dict(zip(own, call.positional, strict=False))
    for key, value in call.named.items():
        name = names.get(key, key)
        if name in arguments:
            raise ValueError(f"{name!r} is given twice")
        arguments[name] = value
    return arguments
