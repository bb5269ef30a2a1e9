"""The line below the chat: what the last reply cost, or why there is none."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .conversation import WebConversation
from .texts import say

if TYPE_CHECKING:
    from minicpm_mlx.lm.outputs import Stats
    from minicpm_mlx.server.http.api_error import ApiError


def status(conversation: WebConversation, language: str, context: int) -> str:
    """A line of Markdown in "en" or "zh"."""
    if conversation.trouble is not None:
        return f"⚠ {plain(trouble(conversation.trouble, language, context))}"
    parts = _cost(conversation.stats, language) if conversation.stats else []
    if conversation.finish_reason == "stopped":
        parts.append(say("stopped", language))
    if conversation.finish_reason == "length":
        parts.append(say("cut", language))
    return " · ".join(map(plain, parts))


def plain(text: str) -> str:
    """Markdown that shows `text` as it is."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def _cost(stats: Stats, language: str) -> list[str]:
    count = stats.completion_tokens
    parts = [say("one_token" if count == 1 else "tokens", language, count=count)]
    parts.append(say("first", language, seconds=stats.ttft))
    if stats.decode_tps:
        parts.append(say("speed", language, speed=stats.decode_tps))
    cached = say("cached", language, cached=stats.cached_tokens, prompt=stats.prompt_tokens)
    return [*parts, cached]


_TROUBLE = {408: "late", 429: "full", 503: "closing", 500: "unexpected"}


def trouble(refusal: ApiError, language: str, context: int) -> str:
    """A refusal in the user's language."""
    if refusal.code == "context_length_exceeded":
        return say("too_long", language, context=context)
    if key := _TROUBLE.get(refusal.status):
        return say(key, language)
    return say("failed", language, reason=refusal.message)
