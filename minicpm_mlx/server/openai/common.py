"""What all answers of OpenAI's API share: identifiers, usage, errors."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from ...lm.outputs import Stats
from ..http.api_error import Refusal
from ..http.streaming import answered, sse, streamed

if TYPE_CHECKING:
    from ..service import Replies, Whole

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}


def identifier(prefix: str) -> str:
    """A name of its own for an answer or a part of one, such as "chatcmpl-3f..."."""
    return prefix + uuid.uuid4().hex


def refused(refusal: Refusal) -> dict[str, Any]:
    """The body of an answer that is none."""
    kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": refusal.message,
            "type": _KINDS.get(refusal.status, kind),
            "param": refusal.field,
            "code": refusal.code,
        }
    }


def usage(stats: Iterable[Sequence[Stats]]) -> dict[str, Any]:
    """Tokens read and written; the replies to one prompt stand together, and it counts once."""
    groups = list(stats)
    prompt = sum(group[0].prompt_tokens for group in groups)
    completion = sum(one.completion_tokens for group in groups for one in group)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(group[0].cached_tokens for group in groups)},
    }


async def wholes(request: Request, replies: Replies) -> list[Whole]:
    """All replies, which are given up when the client leaves."""

    async def work() -> list[Whole]:
        async with replies:
            return await replies.whole()

    return await answered(request, work())


def events(chunks: AsyncGenerator[dict[str, Any], None]) -> StreamingResponse:
    """Chunks as server-sent events, with the word that ends OpenAI's streams."""

    async def lines() -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in chunks:
                yield sse(chunk)
            yield sse("[DONE]")
        finally:
            await chunks.aclose()

    return streamed(lines(), trouble=lambda refusal: sse(refused(refusal)))
