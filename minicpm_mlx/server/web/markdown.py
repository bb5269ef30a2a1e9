"""Prepares a reply's Markdown for Gradio.

Outside code and mathematics, HTML is shown as text, a picture becomes a link to it, and $...$ is
mathematics unless it stands between two prices.
"""

from __future__ import annotations

import re

_LITERAL = re.compile(
    r"(^ {0,3}```.*?(?:^ {0,3}```|\Z)|^ {0,3}~~~.*?(?:^ {0,3}~~~|\Z)"  # code, maybe unfinished
    r"|^(?: {4}|\t)[^\n]*|(?<!`)(`+)(?!`)[^\n]*?(?<!`)\2(?!`)"
    r"|\$\$.*?\$\$|\\\[.*?\\\]|\\\(.*?\\\))",
    re.DOTALL | re.MULTILINE,
)
_DOLLAR_MATH = re.compile(r"(?<![\\$\w])\$(?=\S)([^$\n`]+?)(?<=\S)\$(?![\w$])")
"""Pandoc's rule: no space inside the dollar signs, and no digit after them."""
MATH: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
"""Gradio's delimiters of mathematics, without $...$, which may also stand between two prices."""
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_PICTURE = re.compile(r"!\[([^\]\n]*)\](?=[(\[])")


def prepare(text: str) -> str:
    """`text` for Gradio's Chatbot."""
    parts: list[str] = []
    end = 0
    for literal in _LITERAL.finditer(text):
        parts += [_prepare_text(text[end : literal.start()]), literal[0]]
        end = literal.end()
    return "".join([*parts, _prepare_text(text[end:])])


def _prepare_text(text: str) -> str:
    parts = _DOLLAR_MATH.split(text)  # every second part is mathematics
    parts[::2] = [_PICTURE.sub(_link, _TAG.sub("&lt;", part)) for part in parts[::2]]
    parts[1::2] = [f"\\({part}\\)" for part in parts[1::2]]
    return "".join(parts)


def _link(picture: re.Match[str]) -> str:
    return f"[{picture[1] or '🖼'}]"
