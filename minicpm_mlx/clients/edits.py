"""Edits of a text that leave the rest of it as it is, comments and order included.

A reader of JSON or YAML makes `Node`s with their places in the text; a writer says how values are
put down in its format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .merge import merge, place_of


@dataclass
class Node:
    """A value and its place in the text."""

    value: Any
    start: int
    end: int
    members: dict[str, Node] = field(default_factory=dict)
    items: list[Node] = field(default_factory=list)
    inline: bool = False
    """Whether it is changed as a whole, never inside."""


@dataclass(frozen=True)
class Edit:
    """Text that takes the place of a stretch."""

    start: int
    end: int
    text: str


Insert = Callable[[Node, list[Any]], list[Edit]]
"""Edits that add members (name, value) or items to the end of a mapping or list."""
Replace = Callable[[Node, Any], Edit]


def find_edits(node: Node, new: Any, insert: Insert, replace: Replace) -> list[Edit]:
    """Edits that merge `new` into the value of a node."""
    merged = merge(node.value, new)
    if merged == node.value:
        return []
    if node.inline:
        return [replace(node, merged)]
    edits: list[Edit] = []
    added: list[Any] = []
    if isinstance(node.value, dict) and isinstance(new, dict):
        for name, value in new.items():
            if name in node.members:
                edits += find_edits(node.members[name], value, insert, replace)
            else:
                added.append((name, value))
    elif isinstance(node.value, list) and isinstance(new, list):
        for item in new:
            at = place_of(item, node.value)
            if at is None:
                added.append(item)
            else:
                edits += find_edits(node.items[at], item, insert, replace)
    else:
        return [replace(node, new)]
    return edits + (insert(node, added) if added else [])


def apply_edits(text: str, edits: list[Edit]) -> str:
    """The text with all edits made; of two at one place the earlier in the list comes first."""
    for _, edit in sorted(enumerate(edits), key=lambda row: (row[1].start, row[0]), reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text


def indentation(text: str, at: int) -> str:
    """White space at the beginning of the line of a place."""
    line = text[text.rfind("\n", 0, at) + 1 : at]
    return line[: len(line) - len(line.lstrip(" \t"))]
