"""JSON with comments and trailing commas: read with places, and changed without losing them."""

from __future__ import annotations

import json
import re
from typing import Any

from minicpm_mlx.errors import InvalidArgumentError

from .edits import Edit, Node, apply_edits, find_edits, indentation

_SPACE = re.compile(r"(?:[ \t\r\n]+|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_SCALAR = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null")
_DEPTH = 200


def parse(text: str) -> Any:
    """The value of a text; an empty one is an empty object."""
    return _read(text).value


def update(text: str, new: dict[str, Any]) -> str:
    """The text with `new` merged in."""
    root = _read(text)
    if root.start == root.end:  # nothing but space and comments
        return text + ("\n" if text and not text.endswith("\n") else "") + _dump(new, "") + "\n"

    def insert(node: Node, added: list[Any]) -> list[Edit]:
        return _insert(text, node, added)

    def replace(node: Node, value: Any) -> Edit:
        return Edit(node.start, node.end, _dump(value, indentation(text, node.start), _unit(text)))

    return apply_edits(text, find_edits(root, new, insert, replace))


def _insert(text: str, node: Node, added: list[Any]) -> list[Edit]:
    outer, unit = indentation(text, node.start), _unit(text)
    inner = outer + unit
    children = [*node.members.values(), *node.items]
    rows = [
        f"{json.dumps(a[0], ensure_ascii=False)}: {_dump(a[1], inner, unit)}"
        if isinstance(a, tuple)
        else _dump(a, inner, unit)
        for a in added
    ]
    close = node.end - 1
    at = len(text[:close].rstrip(" \t\r\n"))
    edits = []
    if children:
        last = max(child.end for child in children)
        if "," not in re.sub(r"//[^\n]*|/\*.*?\*/", "", text[last:close], flags=re.DOTALL):
            edits.append(Edit(last, last, ","))
    gap = "" if "\n" in text[at:close] else f"\n{outer}"
    return [
        *edits,
        Edit(at, at, "".join(f"\n{inner}{r}" for r in rows[:1]) + _rest(rows, inner) + gap),
    ]


def _rest(rows: list[str], inner: str) -> str:
    return "".join(f",\n{inner}{row}" for row in rows[1:])


def _unit(text: str) -> str:
    found = re.search(r"\n([ \t]+)\S", text)
    return (
        "\t"
        if found and found[1].startswith("\t")
        else " " * min(len(found[1]), 8)
        if found
        else "  "
    )


def _dump(value: Any, indent: str, unit: str = "  ") -> str:
    return json.dumps(value, indent=unit, ensure_ascii=False).replace("\n", "\n" + indent)


def _read(text: str) -> Node:
    at = _space(text, 0)
    if at == len(text):
        return Node({}, at, at)
    node = _value(text, at, 0)
    if (end := _space(text, node.end)) != len(text):
        raise _wrong(text, end, "end of the file")
    return node


def _space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _value(text: str, at: int, depth: int) -> Node:
    if depth > _DEPTH:
        raise _wrong(text, at, f"at most {_DEPTH} levels")
    first = text[at : at + 1]
    if first and first in "{[":
        return _collection(text, at, depth)
    if first == '"':
        value, end = _string(text, at)
        return Node(value, at, end)
    found = _SCALAR.match(text, at)
    if not found:
        raise _wrong(text, at, "a value")
    try:
        return Node(json.loads(found[0]), at, found.end())
    except ValueError:
        raise _wrong(text, at, "a number of at most 4,300 digits") from None


def _collection(text: str, start: int, depth: int) -> Node:
    mapping = text[start] == "{"
    close = "}" if mapping else "]"
    node = Node({} if mapping else [], start, start)
    at = _space(text, start + 1)
    while text[at : at + 1] != close:
        if mapping:
            if text[at : at + 1] != '"':
                raise _wrong(text, at, 'a name in "" or }')
            name, at = _string(text, at)
            at = _space(text, at)
            if text[at : at + 1] != ":":
                raise _wrong(text, at, ":")
            child = _value(text, _space(text, at + 1), depth + 1)
            node.members[name], node.value[name] = child, child.value
        else:
            child = _value(text, at, depth + 1)
            node.items.append(child)
            node.value.append(child.value)
        at = _space(text, child.end)
        if text[at : at + 1] == ",":
            at = _space(text, at + 1)
        elif text[at : at + 1] != close:
            raise _wrong(text, at, f", or {close}")
    node.end = at + 1
    return node


def _string(text: str, at: int) -> tuple[str, int]:
    try:
        return json.JSONDecoder().raw_decode(text, at)
    except ValueError:
        raise _wrong(text, at, "a string that ends on its line") from None


def _wrong(text: str, at: int, expected: str) -> InvalidArgumentError:
    line = text.count("\n", 0, at) + 1
    got = repr(text[at : at + 12]) if at < len(text) else "the end of the file"
    return InvalidArgumentError(f"line {line}: expected {expected}, got {got}")
