"""The line below the chat: figures of the last reply, or its error."""

from __future__ import annotations

import re

from ...lm.outputs import Stats
from ..http.api_error import ApiError
from .conversation import WebConversation
from .texts import say


def status(conversation: WebConversation, language: str, context: int) -> str:
    """A line of Markdown in "en" or "zh"."""
    if conversation.error is not None:
        return f"⚠ {escape(_error_text(conversation.error, language, context))}"
    parts = _figures(conversation.stats, language) if conversation.stats else []
    if conversation.finish_reason == "stopped":
        parts.append(say("stopped", language))
    if conversation.finish_reason == "length":
        last = conversation.messages[-1:]
        within = bool(last) and not last[0]["content"]
        parts.append(say("ended_thinking" if within else "cut", language))
    return " · ".join(map(escape, parts))


def escape(text: str) -> str:
    """Markdown that shows `text` literally."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", text)


def _figures(stats: Stats, language: str) -> list[str]:
    count = stats.completion_tokens
    parts = [say("one_token" if count == 1 else "tokens", language, count=count)]
    parts.append(say("first", language, seconds=stats.ttft))
    if stats.decode_tps:
        parts.append(say("speed", language, speed=stats.decode_tps))
    cached = say("cached", language, cached=stats.cached_tokens, prompt=stats.prompt_tokens)
    return [*parts, cached]


_ERROR_TEXTS = {408: "late", 429: "full", 503: "closing", 500: "unexpected"}


def _error_text(error: ApiError, language: str, context: int) -> str:
    if error.code == "context_length_exceeded":
        return say("too_long", language, context=context)
    if key := _ERROR_TEXTS.get(error.status):
        return say(key, language)
    return say("failed", language, reason=error.message)
