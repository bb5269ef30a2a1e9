"""Finds the fields of a row that nothing reads: a misspelt one would be missed in silence."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from ...errors import DataError
from ...files.rows import listed
from .examples import Document, Example, Preference
from .layouts import OF_TEMPLATE, Format
from .messages import NOTHING, message_fields
from .tools import parse_objects

_PART = ("type", "text")
_TOOL = ("type", "function")
_FUNCTION = ("name", "description", "parameters", "strict")

Unread = dict[str, Collection[str]]
"""Names of fields that hold something and are not read, as "messages.name" inside a column, with
the names that are read there."""


def check_all_read(unread: Unread, ignored: Collection[str]) -> None:
    """Raises DataError if there is a field that is not read and not `ignored`."""
    unread = {name: fields for name, fields in unread.items() if name not in ignored}
    if not unread:
        return
    known = next(iter(unread.values()))
    found = [name + _meant(name, fields) for name, fields in unread.items()]
    names = ",".join(listed([name]) for name in (*ignored, *unread))
    raise DataError(
        f"{listed(found)}: expected fields that are read ({', '.join(sorted(known))}), found "
        f"others; rename or remove them, or leave them unread: --ignore-columns {names}"
    )


def unread_fields(row: Mapping[str, Any], layout: Format, example: Example) -> Unread:
    """The fields of a row that are not read; one that repeats a text of `example` may be."""
    texts = _texts(example)
    names: Unread = {}
    for name, value in row.items():
        if name not in layout.fields:
            if value not in NOTHING and not _repeats(value, texts):
                names[name] = layout.fields
        elif name in ("tools", "functions"):
            names |= _in_tools(value, name)
        elif name not in OF_TEMPLATE:
            names |= _in_messages(value, name)
    return names


def _in_tools(value: Any, name: str) -> Unread:
    names: Unread = {}
    for tool in parse_objects(value, name) if value not in NOTHING else ():
        function = tool.get("function")
        if isinstance(function, Mapping):
            names |= _filled(tool, _TOOL, name) | _filled(function, _FUNCTION, f"{name}.function")
        else:
            names |= _filled(tool, ("type", *_FUNCTION), name)
    return names


def _in_messages(value: Any, name: str) -> Unread:
    """Of a message, or a list of messages."""
    names: Unread = {}
    for message in value if isinstance(value, list) else [value]:
        if not isinstance(message, dict):
            continue
        names |= _filled(message, message_fields(message), name)
        for key in ("content", "value"):
            for part in parts if isinstance(parts := message.get(key), list) else []:
                if isinstance(part, dict):
                    names |= _filled(part, _PART, f"{name}.{key}")
    return names


def _filled(fields: Mapping[str, Any], read: Collection[str], name: str) -> Unread:
    return {
        f"{name}.{key}": read
        for key, value in fields.items()
        if key not in read and value not in NOTHING
    }


def _meant(name: str, read: Collection[str]) -> str:
    """The name that a misspelt one is like, as a question."""
    close = get_close_matches(name.rpartition(".")[2], sorted(read), n=1, cutoff=0.75)
    return f" ({close[0]}?)" if close else ""


def _texts(example: Example) -> set[str]:
    if isinstance(example, Document):
        return {example.text}
    if isinstance(example, Preference):
        contents = {message["content"] for message in example.prompt}
        return contents | {example.chosen["content"], example.rejected["content"]}
    return {message["content"] for message in example.messages}


def _repeats(value: Any, texts: set[str]) -> bool:
    """Whether a text, or each message of a list, is one of `texts`."""
    if isinstance(value, dict):
        value = value.get("content", value.get("value"))
    if isinstance(value, list):
        return all(isinstance(item, dict) and _repeats(item, texts) for item in value)
    return isinstance(value, str) and value in texts
