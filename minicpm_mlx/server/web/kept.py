"""The conversation as text that the browser keeps, so that no reload and no restart loses it.

The page sends it with each event. It is checked, since anybody can send anything.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

Message = dict[str, Any]
"""Role and content; in a reply also `reasoning_content`, its thought, with `thought_seconds` and
`thought_tokens`."""


class KeptConversation(NamedTuple):
    """Messages, and the page's controls by name as they were for the last question."""

    messages: list[Message]
    settings: dict[str, Any]


def dump(messages: list[Message], settings: dict[str, Any]) -> str:
    """The text; empty where there is no message to keep."""
    if not messages:
        return ""
    return json.dumps({"messages": messages, "settings": settings}, ensure_ascii=False)


def parse(text: str | None) -> KeptConversation:
    """What `dump` wrote; an empty conversation for anything else."""
    try:
        kept = json.loads(text or "")
        messages, settings = [_message(raw) for raw in kept["messages"]], kept["settings"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return KeptConversation([], {})
    return KeptConversation(messages, settings if isinstance(settings, dict) else {})


def _message(raw: Any) -> Message:
    role, content = raw["role"], raw["content"]
    if role not in ("user", "assistant") or not isinstance(content, str):
        raise ValueError
    content.encode()  # ValueError for half a surrogate pair, which no tokenizer takes
    message: Message = {"role": role, "content": content}
    thought = raw.get("reasoning_content")
    if role == "assistant" and isinstance(thought, str) and thought:
        thought.encode()
        message["reasoning_content"] = thought
        for name in ("thought_seconds", "thought_tokens"):
            number = raw.get(name)
            known = isinstance(number, int | float) and 0 <= number < 1e9
            message[name] = number if known else 0
    return message
