"""Checks Lark grammars for llguidance, and converts llama.cpp's GBNF to Lark.

Parts of Lark that would have no effect here, or that cannot be followed, are refused; embedded JSON
schemas are checked like others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from ...arguments import shown
from ...errors import InvalidArgumentError
from .schema_check import written

PARTS = 1000
"""Most rules and brackets: llguidance recurses through them, and a stack of 8 MB holds 2,000."""

RULES = 400
"""Most rules of GBNF: the cost of converting them to Lark grows with their square."""

_WORDS = re.compile(
    r"""(?P<skip>//[^\n]*|\#[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/"""
    r"""|<\[[\d, -]*\]>)"""
    r"""|(?P<json>%json\b\s*)|(?P<attribute>\b(?:max_tokens|temperature|stop)\b(?=\s*=))"""
    r"""|(?P<part>[(\[:])"""
)
"""Tokens of Lark to check; comments, strings, regular expressions and token ids are skipped."""

_GBNF = re.compile(r"(?m)^\s*[\w-]+\s*::=")

_GBNF_WORDS = re.compile(r"""(?P<comment>\#[^\n]*)|"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]""")

_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|.)")


def lark_of(text: str, converted: Callable[[str], str]) -> str:
    """`text`, Lark or GBNF, as Lark for llguidance; `converted` converts GBNF.

    Raises InvalidArgumentError for a grammar that is malformed, too large or not supported.
    """
    return _checked(_from_gbnf(text, converted) if _GBNF.search(text) else text)


def _checked(text: str) -> str:
    """Refuse unsupported parts of a Lark grammar and rewrite its JSON schemas."""
    pieces: list[str] = []
    at = count = 0
    while match := _WORDS.search(text, at):
        pieces.append(text[at : match.end()])
        at = match.end()
        if match["attribute"]:
            raise InvalidArgumentError(
                f"the grammar: the attribute {match['attribute']} is not supported; leave it out"
            )
        if match["json"]:
            schema, at = _schema(text, at)
            pieces.append(schema)
        count += bool(match["part"])
    if count > PARTS:
        raise InvalidArgumentError(
            f"the grammar has {count} rules and brackets; expected at most {PARTS}"
        )
    return "".join([*pieces, text[at:]])


def _schema(text: str, at: int) -> tuple[str, int]:
    """The schema that begins at `at`, rewritten, and its end."""
    try:
        schema, end = json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(
            f"the grammar: %json must be followed by JSON: {error}"
        ) from None
    return written(schema), end


def _from_gbnf(text: str, converted: Callable[[str], str]) -> str:
    # llguidance's converter rejects a line break before "|".
    tidied = re.sub(r"\s*\n\s*(?=\|)", " ", _GBNF_WORDS.sub(_tidied, text))
    if (rules := len(_GBNF.findall(tidied))) > RULES:
        raise InvalidArgumentError(f"the grammar has {rules} rules; expected at most {RULES}")
    try:
        return converted(tidied)
    except Exception as error:  # the converter raises plain Exceptions
        raise InvalidArgumentError(f"the grammar is not GBNF: {shown(str(error))}") from None


def _tidied(match: re.Match[str]) -> str:
    return "" if match["comment"] else _ESCAPE.sub(_letter, match[0])


def _letter(escape: re.Match[str]) -> str:
    """Replace the escape of a letter or digit, which the converter mangles if it begins with 0."""
    number = int(escape[1] or escape[2] or escape[3] or "0", 16)
    letter = chr(number) if number < 0x110000 else ""
    return letter if letter.isalnum() else escape[0]
