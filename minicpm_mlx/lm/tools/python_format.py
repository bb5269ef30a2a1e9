"""Calls as Python: MiniCPM3, 4 and 4.1."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...text.parameters import parameters_of, properties_of
from ...text.python_tools import CLOSING, OPENING, python_name
from .formats import BlockText, Call, CallText, Literal, Schema, Steps, known
from .growing_json import sound_json
from .python_grammar import PythonGrammar
from .python_literals import LENGTH, ArgumentScan, PythonCall, is_within_string, read_calls

_HEAD = re.compile(rf"{re.escape(OPENING)}\s*```\w*[ \t]*\n")
_CALL = re.compile(r"\s*(?P<name>[^\W\d]\w*)\(")
_FENCE = re.compile(r"\s*```\w*[ \t]*\n(?P<source>.*?)\n?[ \t]*```\s*", re.DOTALL)


class PythonToolFormat:
    """A fenced block of calls, one a line, between marks: `f(a="x", b=2)`.

    Names that Python does not take are written as `python_name` has them.
    """

    opening, closing = OPENING, CLOSING
    begins_tag = False
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
        names = by_python_name(functions)
        calls = []
        for call in read_calls(source):
            if call.name not in names:
                raise ValueError(f"no function {call.name!r}")
            name = names[call.name]
            calls.append((name, _arguments(call, functions[name])))
        if not calls:
            raise ValueError("no call")
        return calls

    def steps(self, source: BlockText, functions: Mapping[str, Schema]) -> Steps:
        while (head := _HEAD.match(source.text)) is None:
            yield None
        names, at = by_python_name(functions), head.end()
        while True:
            if begun := _CALL.match(source.text, at):
                name = names[known(begun["name"], names)]
                source.text, at = source.text[begun.end() :], 0
                yield from _call_steps(source, name, functions[name])
            elif (end := source.text.find(self.closing, at)) >= 0:
                source.text = source.text[end + len(self.closing) :]
                return
            else:
                yield None

    def rules(self, rule: str, name: str, arguments: Schema, literal: Literal) -> str:
        return PythonGrammar(rule, arguments, literal).rules(python_name(name))


def by_python_name(names: Iterable[str]) -> dict[str, str]:
    """Names by what a call may have for them."""
    own = list(names)
    return {python_name(name): name for name in own} | {name: name for name in own}


def _call_steps(source: BlockText, name: str, schema: Schema) -> Steps:
    """The arguments of a call after its bracket, each as soon as it is complete."""
    own = list(properties_of(parameters_of(schema)))
    names, count = by_python_name(own), 0
    yield CallText(name, "{")
    scan = ArgumentScan()
    while True:
        if (end := scan.end(source.text)) < 0:
            yield None
            continue
        scan = ArgumentScan()
        text, ends = source.text[:end].strip(), source.text[end] == ")"
        source.text = source.text[end + 1 :]
        if text:
            key, value = _argument(text)
            key = names.get(key, key) if key else own[count]
            yield CallText(name, f"{', ' if count else ''}{sound_json(key)}: {sound_json(value)}")
            count += 1
        if ends:
            yield CallText(name, "}", ends=True)
            return


def _argument(text: str) -> tuple[str, Any]:
    """Name, if it has one, and value; a value that JSON does not have is its text."""
    try:
        [call] = read_calls(f"_({text})")
    except ValueError:
        key, _, value = text.partition("=")
        return key.strip(), value.strip()
    [(key, value)] = call.named.items() or [("", call.positional[0])]
    return key, value


def _source(text: str) -> str:
    """The Python text between the marks, without the fence."""
    if fenced := _FENCE.fullmatch(text):
        return fenced["source"]
    return re.sub(r"^\s*```\w*[ \t]*\n", "", text, count=1)


def _arguments(call: PythonCall, schema: Schema) -> dict[str, Any]:
    """By the names of the schema; values without a name go to its properties in order."""
    own = list(properties_of(parameters_of(schema)))
    names = by_python_name(own)
    if len(call.positional) > len(own):
        raise ValueError("more values than the function has parameters")
    arguments = dict(zip(own, call.positional, strict=False))
    for key, value in call.named.items():
        name = names.get(key, key)
        if name in arguments:
            raise ValueError(f"{name!r} is given twice")
        arguments[name] = value
    return arguments
