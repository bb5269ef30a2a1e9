"""Reads calls in Python's syntax, whose arguments are literals. Nothing is evaluated.

The text is split into tokens first: only brackets, commas, names, numbers, strings and signs in
front of numbers pass, so that Python's parser sees nothing deep, long or costly.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

LENGTH = 2**20
"""Most characters of a block of calls."""
TOKENS = 20_000
"""Most words, numbers, strings and marks in it; Python's syntax tree takes about 1 KB for each."""
DEEP = 50
"""Most brackets in each other: Python's parser takes 100 to 200."""
DIGITS = 400
"""Most characters of a number: reading one takes the square of its length."""

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\n]*)
    |(?P<string>(?P<prefix>[rRuU]?)(?P<body>
        \"\"\"[^\\"]*(?:(?:\\.|"(?!""))[^\\"]*)*\"\"\"|'''[^\\']*(?:(?:\\.|'(?!''))[^\\']*)*'''
        |"[^\\"\n]*(?:\\.[^\\"\n]*)*"|'[^\\'\n]*(?:\\.[^\\'\n]*)*'))
    |(?P<number>(?:0[xX][0-9A-Fa-f]+|\d[\d_]*(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?))
    |(?P<name>[^\W\d]\w*)
    |(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<sign>[+-])|(?P<mark>[,:=;])""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPES = frozenset("\n\\'\"abfnrtvxuUN01234567")
_SIDES = {")": "(", "]": "[", "}": "{"}


@dataclass(frozen=True, kw_only=True)
class PythonCall:
    """A call as it was written."""

    name: str
    positional: list[Any]
    named: dict[str, Any]


def read_calls(source: str) -> list[PythonCall]:
    """The calls that are all of `source`, in lines or with `;` between them.

    ValueError for anything else: another statement, an expression that is no literal, a value that
    JSON has not, or text beyond the limits.
    """
    try:
        tree = ast.parse(_checked(source))
        return [_call(statement) for statement in tree.body]
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"not calls in Python: {error}") from None


def read_literal(source: str) -> Any:
    """The value of a literal that is all of `source`; ValueError as of `read_calls`."""
    calls = read_calls(f"f({source})")
    if len(calls) != 1 or calls[0].named or len(calls[0].positional) != 1:
        raise ValueError("not a single literal")
    return calls[0].positional[0]


def is_within_string(source: str) -> bool:
    """Whether `source` ends within a string that has not ended."""
    at = 0
    while at < len(source):
        token = _TOKEN.match(source, at)
        if token is None:
            rest = source[at:].lstrip("rRuU")
            return rest[:3] in ('"""', "'''") or (rest[:1] in ("'", '"') and "\n" not in rest)
        at = token.end()
        if token["string"] in ('""', "''") and source[at : at + 1] == token["string"][0]:
            return True  # of three quotes
    return False


_WORD = re.compile(r"""(?P<plain>[^"'()\[\]{},]+)|(?P<sign>.)""", re.DOTALL)
_TEXT = {quote: re.compile(rf"(?:[^{quote}\\]+|\\.)+", re.DOTALL) for quote in ("'", '"')}


class ArgumentScan:
    """Finds the end of an argument that is still written; no text in it has three quotes."""

    def __init__(self) -> None:
        self.at = self.depth = 0
        self.quote = ""
        """The mark that ends the text at `at`, within one."""

    def end(self, source: str) -> int:
        """Where the comma or bracket after it is; -1 if it has not come. `source` only grows."""
        while self.at < len(source):
            if self.quote:
                if text := _TEXT[self.quote].match(source, self.at):
                    self.at = text.end()
                elif source[self.at] == "\\":
                    return -1
                else:
                    self.at, self.quote = self.at + 1, ""
                continue
            word = _WORD.match(source, self.at)
            assert word is not None
            sign = word["sign"]
            if not self.depth and sign in (",", ")"):
                return self.at
            self.at = word.end()
            self.quote = sign if sign in ("'", '"') else ""
            self.depth += (sign in _SIDES.values()) - (sign in _SIDES)
        return -1


def _checked(source: str) -> str:
    """`source` as Python's parser may have it; ValueError for what is no call with literals."""
    if len(source) > LENGTH:
        raise ValueError(f"a block has at most {LENGTH} characters")
    pieces: list[str] = []
    sides: list[str] = []
    before: tuple[str | None, str] | None = None
    for count, token in enumerate(_tokens(source.strip())):
        kind, text = token.lastgroup, token[0]
        if count > TOKENS:
            raise ValueError(f"a block has at most {TOKENS} words and marks")
        if kind == "space":
            ends_line = "\n" in text and not sides
            pieces.append("\n" if ends_line else text)
            before = None if ends_line else before
            continue
        _check_order(before, kind, text)
        if kind == "open":
            sides.append(text)
        elif kind == "close" and (not sides or sides.pop() != _SIDES[text]):
            raise ValueError("a bracket ends that did not begin")
        if len(sides) > DEEP:
            raise ValueError(f"at most {DEEP} brackets may be in each other")
        if kind == "number" and len(text) > DIGITS:
            raise ValueError(f"a number has at most {DIGITS} characters")
        raw = token["prefix"] in ("r", "R")
        pieces.append(_ESCAPE.sub(_escape, text) if kind == "string" and not raw else text)
        before = kind, text
    return "".join(pieces)


def _tokens(source: str) -> Iterator[re.Match[str]]:
    at = 0
    while at < len(source):
        token = _TOKEN.match(source, at)
        if token is None:
            raise ValueError(f"no literal begins with {source[at]!r}")
        yield token
        at = token.end()


def _check_order(before: tuple[str | None, str] | None, kind: str | None, text: str) -> None:
    """ValueError for operators, subscripts, calls of results and strings with a prefix that holds
    code, all of which could nest without end."""
    starts = before is None or before[0] == "open" or before[1] in (",", ":", "=", ";")
    called = before is not None and before[0] == "name" and text == "("
    joined = before is not None and kind == before[0] == "string"  # parts of one text
    signed = before is not None and kind == "number" and before[0] == "sign"
    if kind not in ("close", "mark") and not (starts or called or joined or signed):
        raise ValueError(f"{text[:20]!r} must begin a value")


def _escape(match: re.Match[str]) -> str:
    r"""An escape that Python knows; `\/` is JSON's, and others are the two characters."""
    if match[1] in _ESCAPES:
        return match[0]
    return "/" if match[1] == "/" else "\\" + match[0]


def _call(statement: ast.stmt) -> PythonCall:
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise ValueError("a block has calls of functions by name, and nothing else")
    named: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in named:
            raise ValueError("each argument has one name")
        named[keyword.arg] = _value(keyword.value)
    positional = [_value(value) for value in call.args]
    return PythonCall(name=call.func.id, positional=positional, named=named)


def _value(node: ast.expr) -> Any:
    """The value of a literal that JSON has; tuples are lists there."""
    match node:
        case ast.Constant(value=str() as text):
            return _paired(text)
        case ast.Constant(value=bool() | int() | None as value):
            return value
        case ast.Constant(value=float() as value) if math.isfinite(value):
            return value
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant()):
            value = _value(node.operand)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError("a sign is in front of numbers alone")
            return -value if isinstance(sign, ast.USub) else value
        case ast.List() | ast.Tuple():
            return [_value(item) for item in node.elts]
        case ast.Dict():
            return dict(_item(key, value) for key, value in _items(node))
    raise ValueError("arguments must be literals that JSON has")


def _items(node: ast.Dict) -> Iterator[tuple[ast.expr | None, ast.expr]]:
    yield from zip(node.keys, node.values, strict=True)


def _item(key: ast.expr | None, value: ast.expr) -> tuple[str, Any]:
    if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
        raise ValueError("keys of an object must be text")
    return _paired(key.value), _value(value)


def _paired(text: str) -> str:
    """`text` with the halves of surrogate pairs joined, as JSON writes them; ValueError for one
    half alone."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16")
