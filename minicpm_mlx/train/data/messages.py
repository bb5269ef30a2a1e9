"""The turns of a conversation, checked: DataErrors here name the field; the caller adds the place.

The rules are those of a conversation as it is led with `chat`: what a model is trained on should
be what it will be shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import DataError
from ...files.rows import kind

Message = dict[str, str]
"""A turn: `role`, which is system, user or assistant, and `content`."""

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}

_UNSUPPORTED = ("tool_calls", "function_call", "images", "audio", "weight")
"""What a message may carry that would change what is learned."""


def turns(value: Any, name: str) -> list[Message]:
    """The messages of a list, as OpenAI or ShareGPT writes them; `name` is the field's."""
    if not isinstance(value, list):
        raise DataError(f"{name}: expected a list of messages, found {kind(value)}; correct it")
    if not value:
        raise DataError(f"{name}: expected at least one message, found none; remove the sample")
    return [turn(message, f"{name}[{number}]") for number, message in enumerate(value)]


def turn(value: Any, name: str) -> Message:
    """One message, as OpenAI or ShareGPT writes it."""
    if not isinstance(value, dict):
        raise DataError(f"{name}: expected a message {{…}}, found {kind(value)}; correct it")
    for field in _UNSUPPORTED:
        if value.get(field) is not None and value.get(field) not in ([], 1):
            raise DataError(f"{name}.{field}: expected text alone, found {field}; remove the turn")
    who, what = ("from", "value") if "from" in value else ("role", "content")
    return {"role": _role(value, who, name), "content": _content(value, what, name)}


def checked(messages: list[Message], name: str = "") -> list[Message]:
    """`messages`, if an optional system text comes first, then user and assistant by turns.

    Two turns of one speaker are refused: no prompt at inference has them, and a model trained on
    them learns to go on after its own reply, or, in templates without an end mark, sees the two as
    one. So is a conversation whose last turn is not the assistant's, which has nothing to learn.
    """
    where = f"{name}: " if name else ""
    said = messages[1:] if messages[:1] and messages[0]["role"] == "system" else messages
    first = len(messages) - len(said) + 1
    for number, message in enumerate(said):
        expected = ("user", "assistant")[number % 2]
        if message["role"] != expected:
            raise DataError(
                f"{where}turn {first + number}: expected {expected}, found {message['role']}; "
                "user and assistant must take turns, the user first, a system text before them"
            )
    if not said or said[-1]["role"] != "assistant":
        found = said[-1]["role"] if said else "no turn but the system's"
        raise DataError(
            f"{where}expected the assistant's reply as the last turn, found {found}; "
            "add the reply or remove that turn"
        )
    return messages


def words(value: Any, name: str) -> str:
    """A text that is there and is no blank, or OpenAI's list of text parts."""
    if isinstance(value, list):
        value = "".join(_part(part, f"{name}[{number}]") for number, part in enumerate(value))
    if not isinstance(value, str):
        raise DataError(f"{name}: expected text, found {kind(value)}; correct it")
    text = _unicode(value, name)
    if not text.strip():
        raise DataError(f"{name}: expected text, found it empty; remove the sample")
    return text


def plain(value: Any) -> str:
    """A document's text."""
    if isinstance(value, list):
        raise DataError("text: expected text, found a list; correct it")
    return words(value, "text")


def _part(part: Any, name: str) -> str:
    found: Any = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or found != "text" or not isinstance(part.get("text"), str):
        what = f"one of type {found!r}" if isinstance(found, str) else kind(part)
        raise DataError(
            f'{name}: expected a part {{"type": "text", "text": …}}, found {what[:60]}; remove it'
        )
    return part["text"]


def _role(message: Mapping[str, Any], field: str, name: str) -> str:
    if field not in message:
        raise DataError(f"{name}: expected a role and a content, found no {field}; add it")
    role = message[field]
    if not isinstance(role, str) or role not in _ROLES:
        found = repr(role[:40]) if isinstance(role, str) else kind(role)
        raise DataError(
            f"{name}.{field}: expected system, user or assistant (human or gpt), found {found}; "
            "rename it, or remove such samples"
        )
    return _ROLES[role]


def _content(message: Mapping[str, Any], field: str, name: str) -> str:
    if field not in message:
        raise DataError(f"{name}: expected a role and a content, found no {field}; add it")
    return words(message[field], f"{name}.{field}")


def _unicode(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name}: expected valid Unicode, found half a surrogate pair at character "
            f"{error.start + 1}; write both halves or the character itself"
        ) from None
    if "\0" in text:
        raise DataError(
            f"{name}: expected text, found a NUL character at {text.index(chr(0)) + 1}; remove it"
        )
    return text
