"""A reply's text as Markdown that Gradio draws as it was meant.

Outside code and mathematics: HTML is shown as it was written and not obeyed, a picture becomes a
link to it, and $...$ is mathematics only where it is not two prices.
"""

from __future__ import annotations

import re

_KEPT = re.compile(
    r"(^ {0,3}```.*?(?:^ {0,3}```|\Z)|^ {0,3}~~~.*?(?:^ {0,3}~~~|\Z)"  # code, perhaps not yet ended
    r"|^(?: {4}|\t)[^\n]*|(?<!`)(`+)(?!`)[^\n]*?(?<!`)\2(?!`)"
    r"|\$\$.*?\$\$|\\\[.*?\\\]|\\\(.*?\\\))",
    re.DOTALL | re.MULTILINE,
)
_PRICELESS = re.compile(r"(?<![\\$\w])\$(?=\S)([^$\n`]+?)(?<=\S)\$(?![\w$])")
"""Pandoc's rule: no space within the marks, and nothing like a number after them."""
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_PICTURE = re.compile(r"!\[([^\]\n]*)\](?=[(\[])")


def drawn(text: str) -> str:
    """`text` for Gradio's Chatbot."""
    parts: list[str] = []
    end = 0
    for kept in _KEPT.finditer(text):
        parts += [_plain(text[end : kept.start()]), kept[0]]
        end = kept.end()
    return "".join([*parts, _plain(text[end:])])


def _plain(text: str) -> str:
    parts = _PRICELESS.split(text)  # every second one is mathematics
    parts[::2] = [_PICTURE.sub(_link, _TAG.sub("&lt;", part)) for part in parts[::2]]
    parts[1::2] = [f"\\({part}\\)" for part in parts[1::2]]
    return "".join(parts)


def _link(picture: re.Match[str]) -> str:
    return f"[{picture[1] or '🖼'}]"
