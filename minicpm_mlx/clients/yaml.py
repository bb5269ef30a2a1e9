"""YAML in block form, changed in place: comments, order and quotes of the rest stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml as package

from minicpm_mlx.errors import InvalidArgumentError

from .edits import Edit, Node, apply_edits, find_edits

_MOST = 20_000
"""Most values of a file, those of aliases counted wherever they stand."""


def parse(text: str) -> Any:
    """The value of a text; None if it is empty."""
    try:
        return package.safe_load(text)
    except (package.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "cannot be read"
        place = f"line {mark.line + 1}: " if mark else ""
        raise InvalidArgumentError(f"{place}{problem}") from None


def update(text: str, new: Any) -> str:
    """The text with `new` merged in."""
    if parse(text) is None:
        return text + ("\n" if text and not text.endswith("\n") else "") + _dump(new)
    try:
        root = _node(package.compose(text, package.SafeLoader), text, iter(range(_MOST)))
    except RecursionError:
        raise InvalidArgumentError("an alias leads to itself") from None

    def insert(node: Node, added: list[Any]) -> list[Edit]:
        block = _dump(dict(added) if isinstance(node.value, dict) else added)
        line_end = text.find("\n", node.end)
        at = len(text) if line_end < 0 else line_end
        return [Edit(at, at, "\n" + _indent(block, _column(text, node.start)).rstrip("\n"))]

    def replace(node: Node, value: Any) -> Edit:
        if node.start == node.end and isinstance(value, dict | list):  # `models:` and nothing
            column = _column(text, text.rfind("\n", 0, node.start) + 1) + 2
            return Edit(node.start, node.end, "\n" + _indent(_dump(value), column).rstrip("\n"))
        block = bool(node.members or node.items) and not node.inline  # on lines of its own
        space = "  " if block else " " if node.start == node.end else ""
        return Edit(node.start, node.end, space + _in_line(value))

    return apply_edits(text, find_edits(root, new, insert, replace))


def _node(found: Any, text: str, left: Iterator[int]) -> Node:
    """A node of PyYAML's with its value, ending where its last word ends.

    InvalidArgumentError for more nodes than `left` has numbers.
    """
    if next(left, None) is None:
        raise InvalidArgumentError(f"aliases make more than {_MOST} values of it")
    start, end = found.start_mark.index, found.end_mark.index
    if isinstance(found, package.MappingNode):
        members = {str(key.value): _node(value, text, left) for key, value in found.value}
        last = max((node.end for node in members.values()), default=end)
        value: Any = {name: node.value for name, node in members.items()}
        return Node(
            value, start, end if found.flow_style else last, members, inline=bool(found.flow_style)
        )
    if isinstance(found, package.SequenceNode):
        items = [_node(item, text, left) for item in found.value]
        last = max((item.end for item in items), default=end)
        value = [item.value for item in items]
        return Node(
            value,
            start,
            end if found.flow_style else last,
            items=items,
            inline=bool(found.flow_style),
        )
    scalar = package.SafeLoader("").construct_document(found)
    return Node(scalar, start, max(len(text[:end].rstrip()), start) if end > start else start)


def _column(text: str, at: int) -> int:
    """Column of the first word of a block, which may stand behind dashes."""
    begin = text.rfind("\n", 0, at) + 1
    if not text[begin:at].strip(" -"):
        return at - begin
    line = text[begin:]
    return len(line) - len(line.lstrip(" "))


def _indent(text: str, column: int) -> str:
    return "".join(" " * column + line for line in text.splitlines(keepends=True))


def _dump(value: Any) -> str:
    return str(package.safe_dump(value, sort_keys=False, allow_unicode=True, width=10**6))


def _in_line(value: Any) -> str:
    options: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 10**6}
    text = str(package.safe_dump(value, default_flow_style=True, **options))
    return text.removesuffix("\n").removesuffix("\n...")
