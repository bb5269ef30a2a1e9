"""The conversation as a document, which page.js saves as a file."""

from __future__ import annotations

import time

from ...lm.sessions import markdown
from .conversation import WebConversation
from .texts import say


def markdown_of(conversation: WebConversation, language: str, *, thoughts: bool) -> str:
    """Its Markdown in "en" or "zh" after a line with the time, so that no two are alike; empty
    without messages."""
    if not conversation.messages:
        return ""
    served, system = (str(conversation.settings.get(name) or "") for name in ("served", "system"))
    text = markdown(
        time.strftime("%Y-%m-%d %H:%M"),
        served or "MiniCPM",
        system.strip() or None,
        conversation.messages,
        thoughts=thoughts,
        words=(say("you", language), say("a_thought", language)),
    )
    return f"{time.time_ns()}\n{text}"
