"""Grammars as text: Lark's form, and GBNF, llama.cpp's, which is turned into it.

What of Lark's form changes nothing here, or cannot be kept to, is refused; JSON schemas in it are
checked as others are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from ...arguments import shown
from ...errors import InvalidArgumentError
from .json_schema import written

PARTS = 1000
"""Rules and brackets. The library recurses through them, and its stack of 8 MB holds 2,000."""

RULES = 400
"""Of GBNF; what it costs to turn them into Lark's form grows with their square."""

_WORDS = re.compile(
    r"""(?P<skip>//[^\n]*|\#[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/)"""
    r"""|(?P<json>%json\b\s*)|(?P<attribute>\b(?:max_tokens|temperature|stop)\b(?=\s*=))"""
    r"""|(?P<part>[(\[:])"""
)
"""What matters in Lark's form; comments, strings and regular expressions are passed over."""

_GBNF = re.compile(r"(?m)^\s*[\w-]+\s*::=")

_GBNF_WORDS = re.compile(r"""(?P<comment>\#[^\n]*)|"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]""")

_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|.)")


def lark_of(text: str, converted: Callable[[str], str]) -> str:
    """`text`, in either form, as the Lark that llguidance is given; `converted` makes it of GBNF.

    Raises InvalidArgumentError for what is malformed, too large or not supported.
    """
    return _checked(_from_gbnf(text, converted) if _GBNF.search(text) else text)


def _checked(text: str) -> str:
    """Lark's form with what is not supported refused, and its JSON schemas as ours are."""
    pieces: list[str] = []
    at = count = 0
    while found := _WORDS.search(text, at):
        pieces.append(text[at : found.end()])
        at = found.end()
        if found["attribute"]:
            raise InvalidArgumentError(
                f"the grammar: the attribute {found['attribute']} is not supported; leave it out"
            )
        if found["json"]:
            schema, at = _schema(text, at)
            pieces.append(schema)
        count += bool(found["part"])
    if count > PARTS:
        raise InvalidArgumentError(
            f"the grammar has {count} rules and brackets; expected at most {PARTS}"
        )
    return "".join([*pieces, text[at:]])


def _schema(text: str, at: int) -> tuple[str, int]:
    """The schema that begins there, and where it ends."""
    try:
        schema, end = json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(
            f"the grammar: %json must be followed by JSON: {error}"
        ) from None
    return written(schema), end


def _from_gbnf(text: str, converted: Callable[[str], str]) -> str:
    # The converter takes no rule that is broken before a bar.
    tidied = re.sub(r"\s*\n\s*(?=\|)", " ", _GBNF_WORDS.sub(_tidied, text))
    if (rules := len(_GBNF.findall(tidied))) > RULES:
        raise InvalidArgumentError(f"the grammar has {rules} rules; expected at most {RULES}")
    try:
        return converted(tidied)
    except Exception as error:  # it raises plain ones
        raise InvalidArgumentError(f"the grammar is not GBNF: {shown(str(error))}") from None


def _tidied(found: re.Match[str]) -> str:
    return "" if found["comment"] else _ESCAPE.sub(_letter, found[0])


def _letter(escape: re.Match[str]) -> str:
    """A letter or digit for its number, which the converter spoils where it begins with 0."""
    number = int(escape[1] or escape[2] or escape[3] or "0", 16)
    letter = chr(number) if number < 0x110000 else ""
    return letter if letter.isalnum() else escape[0]
