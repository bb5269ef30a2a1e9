"""Messages as Gradio's Chatbot takes them."""

from __future__ import annotations

from typing import Any

from .kept import Message
from .markdown import prepare
from .texts import say


def bubbles_of(
    messages: list[Message], language: str, *, growing: bool = False
) -> list[dict[str, Any]]:
    """Messages in Gradio's form, a thought as a block that opens; the last one may be `growing`."""
    bubbles = []
    for message in messages:
        role, text = message["role"], message["content"]
        if thought := message.get("reasoning_content"):
            pending = growing and not text and message is messages[-1]
            seconds, tokens = message["thought_seconds"], message["thought_tokens"]
            title = say("thought", language, seconds=seconds, tokens=tokens)
            block = {"title": say("thinking", language) if pending else title}
            block["status"] = "pending" if pending else "done"
            bubbles.append({**_bubble(role, thought), "metadata": block})
        if text or not thought:
            bubbles.append(_bubble(role, text))
    return bubbles


def _bubble(role: str, text: str) -> dict[str, Any]:
    """Plain strings would lose their indentation."""
    return {"role": role, "content": [{"type": "text", "text": prepare(text)}]}
