"""Errors, usage, streams and log probabilities of OpenAI's APIs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

from fastapi.responses import StreamingResponse

from ...engine import TokenLogprob
from ...lm.outputs import Stats
from ..http.api_error import ERROR_TYPES, ApiError
from ..http.streaming import sse, stream_response
from ..reply_stream import Chunk
from ..service import Service


def error_body(error: ApiError) -> dict[str, Any]:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": ERROR_TYPES.get(error.status, kind),
            "param": error.field,
            "code": error.code,
        }
    }


def usage(stats: Iterable[Sequence[Stats]]) -> dict[str, Any]:
    """Token counts of replies, grouped by prompt; each prompt counts once."""
    groups = list(stats)
    prompt = sum(group[0].prompt_tokens for group in groups)
    completion = sum(reply.completion_tokens for group in groups for reply in group)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(group[0].cached_tokens for group in groups)},
        "completion_tokens_details": {
            "reasoning_tokens": sum(reply.thinking_tokens for group in groups for reply in group)
        },
    }


class StreamUsage:
    """The `usage` of a stream's chunks: `n` replies to each of the prompts of so many tokens.

    With `total` a last chunk has that of all; with `running` each has its reply's so far.
    """

    def __init__(self, prompt_tokens: Sequence[int], n: int, *, total: bool, running: bool):
        self.prompt_tokens, self.n = prompt_tokens, n
        self.total, self.running = total, running
        self.counts = [0] * (len(prompt_tokens) * n)
        self.stats: list[list[Stats]] = [[] for _ in prompt_tokens]

    def add(self, chunk: Chunk) -> None:
        self.counts[chunk.index] += len(chunk.tokens)
        if chunk.stats is not None:
            self.stats[chunk.index // self.n].append(chunk.stats)

    def fields(self, index: int) -> dict[str, Any]:
        """The field of a chunk of that reply, if it has one."""
        if not self.total:
            return {}
        if not self.running:
            return {"usage": None}
        prompt, completion = self.prompt_tokens[index // self.n], self.counts[index]
        tokens = {"prompt_tokens": prompt, "completion_tokens": completion}
        return {"usage": tokens | {"total_tokens": prompt + completion}}

    def last(self) -> list[dict[str, Any]]:
        """The fields of the last chunk, if there is one."""
        return [{"choices": [], "usage": usage(self.stats)}] if self.total else []


def stream_events(chunks: AsyncGenerator[dict[str, Any], None]) -> StreamingResponse:
    """Chunks as server-sent events, with OpenAI's final [DONE]."""
    return stream_response(chunks, encode=sse, error_body=error_body, last=sse("[DONE]"))


def token_name(service: Service, token: int) -> str:
    """A token's text; for an incomplete character its bytes, such as "bytes:\\xe4\\xbd"."""
    data = service.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(service: Service, tokens: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """The chat API's `logprobs.content`; the responses API calls it `logprobs`."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": token_name(service, token),
            "logprob": logprob,
            "bytes": list(service.token_bytes(token)),
        }

    return [
        entry(scored.token, scored.logprob)
        | {"top_logprobs": [entry(*other) for other in scored.top]}
        for scored in tokens
    ]


class CompletionLogprobs:
    """The completions API's `logprobs` of one text, chunk by chunk; counts the text offsets."""

    def __init__(self, service: Service, skip_special: bool, continues: bool):
        self.service = service
        self.decoder = service.lm.tokenizer.stream(skip_special, continues)
        self.offset = 0
        """Characters of the text so far."""

    def add(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Names, log probabilities and text offsets of the next tokens: lists of one length."""
        return {
            "tokens": [token_name(self.service, scored.token) for scored in tokens],
            "token_logprobs": [scored.logprob for scored in tokens],
            "top_logprobs": [self._top(scored) for scored in tokens],
            "text_offset": [self._advance(scored.token) for scored in tokens],
        }

    def _top(self, scored: TokenLogprob) -> dict[str, float] | None:
        """The likeliest tokens by name, and the token itself, which need not be among them."""
        if scored.logprob is None:
            return None
        logprobs: dict[str, float] = {}
        for token, logprob in (*scored.top, (scored.token, scored.logprob)):
            logprobs.setdefault(token_name(self.service, token), logprob)
        return logprobs

    def _advance(self, token: int) -> int:
        """The offset of `token` in the text."""
        start = self.offset
        self.offset += len(self.decoder.add(token))
        return start
