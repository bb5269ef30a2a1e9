"""Files attached to a message, and messages taken apart again."""

from __future__ import annotations

import re
from collections.abc import Iterable

Files = list[tuple[str, str]]
"""Name and text of each."""


_FILE = re.compile(r"([^\n]+):\n(`{3,})\n(.*?)\n\2\n\n", re.S)


def with_files(files: Iterable[tuple[str, str]], text: str) -> str:
    """A message with files before it, each under its name in a fence."""
    parts = []
    for name, body in files:
        longest = max(map(len, re.findall("`+", body)), default=0)
        fence = "`" * max(longest + 1, 3)  # longer than any within
        parts.append(f"{name}:\n{fence}\n{body}\n{fence}\n\n")
    return "".join(parts) + text


def without_files(message: str) -> tuple[Files, str]:
    """The files of a message that `with_files` made, and its text."""
    files, end = [], 0
    while found := _FILE.match(message, end):
        files.append((found[1], found[3]))
        end = found.end()
    return files, message[end:]
