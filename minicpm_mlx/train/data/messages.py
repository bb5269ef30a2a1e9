"""Parses and checks the messages of a conversation.

A DataError raised here names the field; the caller adds file and line. The rules match those of
`chat`, so that a model is trained on the prompts it will see at inference.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ...arguments import shown
from ...errors import DataError
from ...files.rows import kind, listed
from ...lm.tools.argument_check import argument_problem
from .tools import parse_calls

Message = dict[str, Any]
"""`role` (system, user, assistant or tool) and `content`; an assistant's may have `tool_calls` and
`reasoning_content`, a tool's `tool_call_id` and `name`."""

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
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""The last are ShareGPT's; `function` is OpenAI's older name of a tool."""

_UNSUPPORTED = ("images", "image", "videos", "video", "audios", "audio")
"""Fields of a message that would change what is learned."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names of the field of a reply's thought."""

_CALLS = ("tool_calls", "function_call")
"""Names of the field of a reply's calls; the second is OpenAI's older one, of a single call."""

_OF_RESULTS = ("tool_call_id", "name")
"""Fields of a tool's message that a template may use."""

_MARKS = ("loss", "train", "weight")
"""Fields that say whether a reply is learned, in ms-swift's, axolotl's and OpenAI's data."""

_READ = {"role", "content", "from", "value", *_MARKS, *THOUGHTS, *_CALLS}

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
    parsed_role = _parse_role(value[role], f"{name}.{role}") if role in value else ""
    replied = _parse_reply(value, parsed_role, name) if parsed_role else {}
    for field in (role, content):
        if field not in value and not (field == content and "tool_calls" in replied):
            raise DataError(f"{name}: expected a role and a content, found no {field}; add it")
    text = "" if value[role] == "function_call" else value.get(content)
    if not is_blank(text) or not (parsed_role in ("system", "tool") or "tool_calls" in replied):
        text = parse_text(text, f"{name}.{content}")
    elif parsed_role != "tool" or not isinstance(text, str):
        text = ""
    message = {"role": parsed_role, "content": text, **replied}
    if parsed_role == "tool":
        message |= {key: value[key] for key in _OF_RESULTS if isinstance(value.get(key), str)}
    marks = [_parse_mark(value, field, parsed_role, name) for field in _MARKS]
    return message | ({UNLEARNED: "yes"} if False in marks else {})


def _parse_reply(value: Mapping[str, Any], role: str, name: str) -> Message:
    """The thought and the calls of a reply; DataError if another message has any."""
    filled = [key for key in (*THOUGHTS, *_CALLS) if value.get(key) not in NOTHING]
    if filled and role != "assistant":
        raise DataError(
            f"{name}.{filled[0]}: expected it in the assistant's messages alone, found it in the "
            f"{role}'s; remove it"
        )
    message: Message = {}
    if thought := parse_thought(value, f"{name}."):
        message["reasoning_content"] = thought
    calls = [(key, value[key]) for key in _CALLS if key in filled]
    for key, content in (("from", "value"), ("role", "content")):
        if value.get(key) == "function_call":
            calls.append((content, value.get(content)))
    if len(calls) > 1:
        raise DataError(
            f"{name}: expected calls once, found {listed(c[0] for c in calls)}; remove one"
        )
    for key, found in calls:
        message["tool_calls"] = parse_calls(found, f"{name}.{key}")
    return message


def parse_thought(fields: Mapping[str, Any], prefix: str = "") -> str:
    """The thought in one of the fields that hold one; "" if there is none."""
    filled = [key for key in THOUGHTS if not is_blank(fields.get(key)) and fields[key] != []]
    thoughts = {parse_text(fields[key], f"{prefix}{key}") for key in filled}
    if len(thoughts) > 1:
        raise DataError(
            f"{prefix}{filled[1]}: expected the text of {filled[0]}, found another; remove one"
        )
    return next(iter(thoughts), "")


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
    return [{key: m[key] for key in m if key != UNLEARNED} for m in messages], marked


def message_fields(message: Mapping[str, Any]) -> set[str]:
    """Names of the fields that are read in a message."""
    is_result = _ROLES.get(str(message.get("role", message.get("from")))) == "tool"
    return _READ | set(_OF_RESULTS if is_result else ())


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

    Results of tools come after the message that calls them, at most one for each call. Two messages
    of one role in a row are refused: no prompt at inference has them, and a model trained on them
    learns to continue after its own reply. So is a conversation that does not end with the
    assistant, which leaves nothing to learn.
    """
    prefix = f"{name}: " if name else ""
    turns = messages[1:] if messages[:1] and messages[0]["role"] == "system" else messages
    calls: list[dict[str, Any]] = []
    expected, results = "user", 0
    for index, message in enumerate(turns):
        role, number = message["role"], len(messages) - len(turns) + index + 1
        is_result = role == "tool" and (expected == "tool" or 0 < results < len(calls))
        if role != expected and not is_result:
            rule = "user and assistant must alternate, starting with the user, after an optional "
            rule += "system message"
            if "tool" in (expected, role):
                rule = "each message with tool_calls is followed by their results, and no other is"
            raise DataError(f"{prefix}message {number}: expected {expected}, found {role}; {rule}")
        if role == "tool":
            _check_result(message, calls, f"{prefix}message {number}")
        results = results + 1 if role == "tool" else 0
        calls = message.get("tool_calls", []) if role == "assistant" else calls
        expected = {"user": "assistant", "tool": "assistant"}.get(role, "tool" if calls else "user")
    if not turns or turns[-1]["role"] != "assistant":
        last = turns[-1]["role"] if turns else "only a system message"
        raise DataError(
            f"{prefix}expected the assistant's reply as the last message, found {last}; "
            "add the reply or remove that message"
        )
    return messages


def _check_result(message: Message, calls: list[dict[str, Any]], name: str) -> None:
    found, ids = message.get("tool_call_id"), [call.get("id") for call in calls]
    if found is not None and None not in ids and found not in ids:
        raise DataError(
            f"{name}: expected the tool_call_id of a call before it ({listed(map(str, ids))}), "
            f"found {found!r:.60}; correct it"
        )


def check_calls(
    messages: list[Message], tools: Sequence[Mapping[str, Any]], exempt: Collection[int] = ()
) -> None:
    """Raises DataError for a call that none of `tools` takes, but in messages that are `exempt`."""
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    for index, message in enumerate(messages):
        for call in () if index in exempt else message.get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            place = f"message {index + 1}"
            if name not in functions:
                raise DataError(
                    f"{place}: expected a call of one of the tools ({listed(functions) or 'none'}),"
                    f" found {name!r:.60}; add it to tools, or correct it"
                )
            problem = argument_problem(arguments, functions[name].get("parameters") or {})
            if problem is not None:
                raise DataError(
                    f"{place}: {name}{problem}; correct the call, or parameters in tools"
                )


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
        f"{name}: expected system, user, assistant or tool (or human and gpt), found {label}; "
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
