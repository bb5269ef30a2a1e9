"""Parses and checks the messages of a conversation.

A DataError raised here names the field; the caller adds file and line. The rules match those of
`chat`, so that a model is trained on the prompts it will see at inference.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ...arguments import shown
from ...errors import DataError
from ...files.rows import kind

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`."""

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

_UNSUPPORTED = (
    *("tool_calls", "function_call", "images", "audio"),
    *("reasoning_content", "reasoning", "thinking"),
)
"""Fields of a message that would change what is learned."""

_MARKS = ("loss", "train", "weight")
"""Fields that say whether a reply is learned, in ms-swift's, axolotl's and OpenAI's data."""

_READ = {"role", "content", "from", "value", *_MARKS}

UNLEARNED = "unlearned"
"""Key of a parsed reply that is marked not to be learned."""


def parse_messages(value: Any, name: str) -> list[Message]:
    """Parses a list of messages as OpenAI or ShareGPT writes them; `name` is the field's."""
    if not isinstance(value, list):
        raise DataError(f"{name}: expected a list of messages, found {kind(value)}; correct it")
    if not value:
        raise DataError(f"{name}: expected at least one message, found none; remove the sample")
    messages = [parse_message(message, f"{name}[{index}]") for index, message in enumerate(value)]
    # As in `chat`, where an empty system prompt is none.
    return [m for m in messages if m["role"] != "system" or m["content"]]


def parse_message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{name}: expected a message {{…}}, found {kind(value)}; correct it")
    for field in _UNSUPPORTED:
        if value.get(field) not in NOTHING:
            raise DataError(
                f"{name}.{field}: expected text alone, found {field}; write it into the content, "
                "or remove it"
            )
    role, content = ("from", "value") if "from" in value else ("role", "content")
    for field in (role, content):
        if field not in value:
            raise DataError(f"{name}: expected a role and a content, found no {field}; add it")
    parsed_role = _parse_role(value[role], f"{name}.{role}")
    if parsed_role == "system" and is_blank(value[content]):
        return {"role": parsed_role, "content": ""}
    message = {
        "role": parsed_role,
        "content": parse_text(value[content], f"{name}.{content}"),
    }
    marks = [_parse_mark(value, field, parsed_role, name) for field in _MARKS]
    return message | ({UNLEARNED: "yes"} if False in marks else {})


def _parse_mark(value: Mapping[str, Any], field: str, role: str, name: str) -> bool | None:
    """Whether the message is learned; None if `field` does not say."""
    mark = value.get(field)
    if mark is None:
        return None
    if not isinstance(mark, (bool, int, float)) or mark not in (0, 1):
        label = shown(mark) if isinstance(mark, (int, float)) else kind(mark)
        raise DataError(f"{name}.{field}: expected true, false, 0 or 1, found {label}; correct it")
    if role == "assistant":
        return bool(mark)
    if mark and field != "weight":  # a weight of 1 is OpenAI's default
        raise DataError(
            f"{name}.{field}: expected only replies to be learned, found it on the {role}'s "
            'message; remove it, or learn every token (mask "all")'
        )
    return None


def split_marks(messages: list[Message]) -> tuple[list[Message], frozenset[int]]:
    """Returns messages without marks, and the indices of replies that are not learned."""
    marked = frozenset(i for i, message in enumerate(messages) if UNLEARNED in message)
    return [{key: m[key] for key in ("role", "content")} for m in messages], marked


def unread_fields(value: Any, name: str) -> set[str]:
    """Names of fields in a message, or a list of messages, that are not read and hold something."""
    names: set[str] = set()
    for message in value if isinstance(value, list) else [value]:
        if not isinstance(message, dict):
            continue
        names |= _filled(message, _READ, name)
        for key in ("content", "value"):
            for part in parts if isinstance(parts := message.get(key), list) else []:
                if isinstance(part, dict):
                    names |= _filled(part, {"type", "text"}, f"{name}.{key}[]")
    return names


def _filled(fields: Mapping[str, Any], read: Collection[str], name: str) -> set[str]:
    return {f"{name}.{key}" for key in fields if key not in read and fields[key] not in NOTHING}


NOTHING: tuple[object, ...] = (None, "", [], {}, "[]", "{}")
"""Values of a field that holds nothing; LLaMA-Factory's `tools` are JSON in a text."""


def is_blank(value: Any) -> bool:
    """Whether a text, or a list of text parts, is null or only blanks."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        return all(map(is_blank, parts))
    return value is None or (isinstance(value, str) and not value.strip())


def check_roles(messages: list[Message], name: str = "") -> list[Message]:
    """Returns `messages` if user and assistant alternate after an optional system message.

    Two messages of one role in a row are refused: no prompt at inference has them, and a model
    trained on them learns to continue after its own reply. So is a conversation that does not end
    with the assistant, which leaves nothing to learn.
    """
    prefix = f"{name}: " if name else ""
    turns = messages[1:] if messages[:1] and messages[0]["role"] == "system" else messages
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            number = len(messages) - len(turns) + index + 1
            raise DataError(
                f"{prefix}message {number}: expected {expected}, found {message['role']}; user and "
                "assistant must alternate, starting with the user, after an optional system message"
            )
    if not turns or turns[-1]["role"] != "assistant":
        last = turns[-1]["role"] if turns else "only a system message"
        raise DataError(
            f"{prefix}expected the assistant's reply as the last message, found {last}; "
            "add the reply or remove that message"
        )
    return messages


def parse_text(value: Any, name: str) -> str:
    """Parses a non-blank string, or OpenAI's list of text parts."""
    if isinstance(value, list):
        value = "".join(
            _parse_text_part(part, f"{name}[{index}]") for index, part in enumerate(value)
        )
    if not isinstance(value, str):
        raise DataError(f"{name}: expected text, found {kind(value)}; correct it")
    _check_characters(value, name)
    if not value.strip():
        raise DataError(f"{name}: expected text, found it empty; remove the sample")
    return value


def _parse_text_part(part: Any, name: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    part_type = part.get("type") if isinstance(part, dict) else None
    label = f"one of type {part_type!r}" if isinstance(part_type, str) else kind(part)
    raise DataError(
        f'{name}: expected a part {{"type": "text", "text": …}}, found {label[:60]}; remove it'
    )


def _parse_role(role: Any, name: str) -> str:
    if isinstance(role, str) and role in _ROLES:
        return _ROLES[role]
    label = repr(role[:40]) if isinstance(role, str) else kind(role)
    raise DataError(
        f"{name}: expected system, user or assistant (human or gpt), found {label}; "
        "rename it, or remove such samples"
    )


def _check_characters(text: str, name: str) -> None:
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
