"""The conversation as text that the browser keeps, so that no reload and no restart loses it.

The page sends it with each event. It is checked, since anybody can send anything.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class KeptConversation(NamedTuple):
    """Messages, and the page's controls by name as they were for the last question."""

    messages: list[dict[str, str]]
    settings: dict[str, Any]


def dump(messages: list[dict[str, str]], settings: dict[str, Any]) -> str:
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


def _message(raw: Any) -> dict[str, str]:
    role, content = raw["role"], raw["content"]
    if role not in ("user", "assistant") or not isinstance(content, str):
        raise ValueError
    content.encode()  # ValueError for half a surrogate pair, which no tokenizer takes
    return {"role": role, "content": content}
