"""What all answers of OpenAI's API share: identifiers, usage, errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fastapi.responses import StreamingResponse

from ...engine.logprobs import TokenLogprob
from ...lm.outputs import Stats
from ..http.api_error import ApiError
from ..http.streaming import sse, streamed

if TYPE_CHECKING:
    from ..service import Service

if TYPE_CHECKING:
    pass

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}


def refused(refusal: ApiError) -> dict[str, Any]:
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


def token_name(service: Service, token: int) -> str:
    """A token's text; where it is no whole character, its bytes: "bytes:\\xe4\\xbd"."""
    data = service.bytes_of(token)
    try:
        data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    return service.text_of(token)


def chat_logprobs(service: Service, tokens: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """The chat API's `logprobs.content`, and what the responses API calls `logprobs`."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": token_name(service, token),
            "logprob": logprob,
            "bytes": list(service.bytes_of(token)),
        }

    return [
        entry(one.token, one.logprob) | {"top_logprobs": [entry(*other) for other in one.top]}
        for one in tokens
    ]


class CompletionLogprobs:
    """The older API's `logprobs` of one text, a part at a time; it keeps count of the offsets."""

    def __init__(self, service: Service, skip_special: bool):
        self.service = service
        self.decoder = service.lm.tokenizer.stream(skip_special)
        self.offset = 0
        """Characters of the text so far."""

    def of(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The next tokens' names, log probabilities and places, as four lists of one length."""
        return {
            "tokens": [token_name(self.service, one.token) for one in tokens],
            "token_logprobs": [one.logprob for one in tokens],
            "top_logprobs": [self._top(one) for one in tokens],
            "text_offset": [self._advance(one.token) for one in tokens],
        }

    def _top(self, one: TokenLogprob) -> dict[str, float] | None:
        """The likeliest by name, and the token itself, which need not be among them."""
        if one.logprob is None:
            return None
        named: dict[str, float] = {}
        for token, logprob in (*one.top, (one.token, one.logprob)):
            named.setdefault(token_name(self.service, token), logprob)
        return named

    def _advance(self, token: int) -> int:
        """Where `token` begins in the text."""
        start = self.offset
        self.offset += len(self.decoder.add(token))
        return start
