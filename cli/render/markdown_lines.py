"""Classifies a line of Markdown as early as its beginning allows."""

from __future__ import annotations

import re
from typing import NamedTuple

MARKER = re.compile(r"( *)(?:(>) ?|([-+*]|\d{1,9}[.)])(?: +|$))")
RULE = re.compile(r" *([-*_])(?: *\1){2,} *")
HEADING = re.compile(r"#{1,6} +([^ ].*)")
FENCE = re.compile(r"(`{3,}(?=[^`]*$)|~{3,})[ {.]*([\w+#-]*).*")
KINDS = {"rule": RULE, "heading": HEADING, "row": re.compile(r"\|.*"), "fence": FENCE}
DELIMITERS = re.compile(r"\| *:?-+:? *(?:\| *:?-+:? *)*\|? *")
UNSURE = re.compile(r" *(?:#{1,6} *|`{1,2}|~{1,2}|[-+*]|\d{1,9}[.)]?|([-*_])(?: *\1)* *)?")


class Line(NamedTuple):
    """A line's kind and its prefixes, from its beginning."""

    kind: str  # "blank", "text", "heading", "rule", "fence" or "row" (of a table)
    first: str = ""  # written in front of it: indentation, bars of quotes, a list item's mark
    hang: str = ""  # the same for the lines it is wrapped to
    rest: str = ""  # what follows these in the source
    quotes: int = 0
    inside: int = 0  # columns of list items and indentation, which a fence's lines have again


def classify(line: str, formula: bool = False) -> Line | None:
    """The line's kind; None while more of the line (a newline ends it) could still change that."""
    ended, rest = line.endswith("\n"), line.rstrip("\n").expandtabs(4)
    first, hang, quotes, inside = "", "", 0, 0
    for _ in range(0 if formula else 16):  # deeper nesting is taken as text
        if not ended and UNSURE.fullmatch(rest):
            return None
        if RULE.fullmatch(rest) or not (marker := MARKER.match(rest)):
            break
        indent, quote, item = marker.groups()
        mark = indent + ("│ " if quote else "• " if item in "-+*" else f"{item} ")
        first, hang = first + mark, hang + (mark if quote else " " * len(mark))
        quotes, inside = (quotes + 1, 0) if quote else (quotes, inside + marker.end())
        rest = rest[marker.end() :]
    text = rest.lstrip(" ")
    if not text.strip() and not (ended and first):
        return Line("blank") if ended else None
    indent = " " * (len(rest) - len(text))
    found = (kind for kind, pattern in KINDS.items() if pattern.fullmatch(text))
    kind = "text" if formula else next(found, "text")
    if kind in ("row", "fence") and not ended:
        return None  # an info string must have no backtick, and a row is drawn with its table
    return Line(kind, first + indent, hang + indent, text, quotes, inside + len(indent))
