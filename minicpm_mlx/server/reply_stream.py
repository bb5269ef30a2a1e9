"""Turns the scheduler's events into chunks of text for clients that wait on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import fastapi

from ..engine import (
    ClosedError,
    Grammar,
    PrefillDone,
    QueueFullError,
    Request,
    RequestEvent,
    RequestFailed,
    Sampling,
    TokenLogprob,
)
from ..errors import InvalidArgumentError
from ..lm.outputs import Stats, Transcript
from ..lm.tools.held_calls import HeldCalls
from ..text.chat_prompt import ChatPrompt
from ..text.tokenizer import Tokenizer
from .http.api_error import ApiError
from .http.streaming import run_until_disconnect


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model name that clients may ask for."""

    name: str
    adapter: str | None
    """The adapter's name; None is the model without adapter."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A request for one reply."""

    prompt: ChatPrompt
    served: ServedModel
    sampling: Sampling
    think_tokens: int | None = None
    """Longest thought, in tokens; None: no limit."""
    continues: bool = False
    """The prompt is text that the reply continues, so that a space may come first."""
    max_tokens: int | None = None
    """None: the service's default. 0: the prompt is read and nothing is generated."""
    min_tokens: int = 0
    """The reply does not end before this many."""
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    """They end the reply, besides the model's own."""
    ignore_eos: bool = False
    keep_special: bool = False
    """Special tokens appear in the text."""
    token_marks: Mapping[int, str] = field(default_factory=dict)
    """Put in front of the text of tokens, for the reader of calls."""
    top_logprobs: int | None = None
    """Log probabilities of the tokens, and of this many of the likeliest; None: none."""
    logprob_start: int | None = None
    """Log probabilities of the prompt's tokens too, from this position on."""
    grammar: Grammar | None = None
    """Restricts the answer."""

    @property
    def has_form(self) -> bool:
        """Whether the answer has a form: more than calls in free text."""
        return self.grammar is not None and not isinstance(self.grammar, HeldCalls)

    @property
    def has_end(self) -> bool:
        """Whether a grammar says where the reply may end."""
        return self.has_form or (isinstance(self.grammar, HeldCalls) and not self.grammar.several)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The next part of a reply."""

    index: int
    """Of the GenerationRequest it belongs to."""
    text: str = ""
    """Text of the answer that is final: whole characters, and no part of a stop string."""
    thinking: str = ""
    """Text of the thought before it."""
    tokens: tuple[TokenLogprob, ...] = ()
    """Tokens since the last chunk, without the end of text."""
    answer_tokens: tuple[TokenLogprob, ...] = ()
    """Those of them that belong to the answer."""
    pause: float | None = None
    """Seconds since the token before; None for the first, and for a chunk without a token."""
    prompt: tuple[TokenLogprob, ...] = ()
    """In the first chunk where `logprob_start` is set: the prompt's tokens from there on."""
    finish_reason: str | None = None
    """In the last chunk: "stop" or "length"."""
    stopped_by: str | None = None
    """In the last chunk: the stop string that was found."""
    stats: Stats | None = None
    """In the last chunk."""


@dataclass(frozen=True, kw_only=True)
class FullReply(Chunk):
    """All chunks of a reply joined."""

    finish_reason: str
    stats: Stats


class ReplyState:
    """Turns the scheduler's events of one reply into chunks."""

    def __init__(
        self, tokenizer: Tokenizer, index: int, generation: GenerationRequest, request: Request
    ):
        self.index, self.request = index, request
        self.transcript = Transcript(
            tokenizer,
            generation.stop,
            eos=request.eos,
            skip_special=not generation.keep_special,
            continues=generation.continues and not generation.has_form,
            token_marks=generation.token_marks,
            thinking=generation.prompt.thinking,
            in_thought=generation.prompt.in_thought,
        )
        self.start, self.first, self.latest, self.cached = time.perf_counter(), 0.0, 0.0, 0

    def chunks(self, event: RequestEvent) -> list[Chunk]:
        """The chunks that an event completes; ApiError if the reply failed."""
        if isinstance(event, RequestFailed):
            raise api_error_of(event.error)
        if isinstance(event, PrefillDone):
            self.cached = event.cached_tokens
            prompt = event.prompt_logprobs
            chunks = [Chunk(index=self.index, prompt=prompt)] if prompt or event.final else []
            return [*chunks, self._last()] if event.final else chunks
        now = time.perf_counter()
        pause = now - self.latest if self.latest else None
        self.first, self.latest = self.first or now, now
        piece = self.transcript.add(event.token_logprob.token)
        tokens = (event.token_logprob,) if piece.token_ids else ()
        chunks = []
        if tokens:
            chunk = Chunk(
                index=self.index,
                text=piece.text,
                thinking=piece.thinking,
                tokens=tokens,
                answer_tokens=tokens if piece.kind == "answer" else (),
                pause=pause,
            )
            chunks = [chunk]
        return [*chunks, self._last()] if event.finish_reason or self.transcript.ended else chunks

    def _last(self) -> Chunk:
        stats = Stats.measure(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached,
            completion_tokens=self.transcript.count,
            thinking_tokens=self.transcript.thinking_count,
            start=self.start,
            first=self.first,
        )
        piece = self.transcript.finish(stats)
        return Chunk(
            index=self.index,
            text=piece.text,
            thinking=piece.thinking,
            finish_reason=piece.finish_reason,
            stopped_by=self.transcript.stopped_by,
            stats=stats,
        )


class ReplyStream:
    """The replies to several requests: `async for chunk in stream`, or `await stream.whole()`.

    `async with stream:` cancels what is not finished at the end of the block. So does deleting the
    stream, which happens when its client leaves before the response begins.
    """

    def __init__(
        self,
        states: Sequence[ReplyState],
        cancel: Callable[[Sequence[Request]], None],
        observe: Callable[[Chunk], None],
    ):
        self._states = list(states)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[ReplyState, RequestEvent]] = asyncio.Queue()
        self._cancel, self._observe = cancel, observe

    def put(self, events: Sequence[tuple[ReplyState, RequestEvent]]) -> None:
        """Adds events, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._put_now, events)
        except RuntimeError:  # the loop has ended, and with it whoever waits for the replies
            self._cancel([state.request for state in self._states])

    def _put_now(self, events: Sequence[tuple[ReplyState, RequestEvent]]) -> None:
        for event in events:
            self._events.put_nowait(event)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while self._states:
            state, event = await self._events.get()
            if state not in self._states:
                continue  # this reply is finished
            for chunk in state.chunks(event):
                if chunk.finish_reason:
                    self._states.remove(state)
                    self._cancel([state.request])
                self._observe(chunk)
                yield chunk

    async def whole(self) -> list[FullReply]:
        """All replies, in the order of their requests."""
        chunks: list[list[Chunk]] = [[] for _ in self._states]
        async with self:
            async for chunk in self:
                chunks[chunk.index].append(chunk)
        return [_join(reply) for reply in chunks]

    async def __aenter__(self) -> ReplyStream:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what is not finished."""
        if self._states:
            self._cancel([state.request for state in self._states])
            self._states.clear()

    __del__ = close


def _join(chunks: Sequence[Chunk]) -> FullReply:
    last = chunks[-1]
    assert last.finish_reason
    assert last.stats
    return FullReply(
        index=last.index,
        text="".join(chunk.text for chunk in chunks),
        thinking="".join(chunk.thinking for chunk in chunks),
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        answer_tokens=tuple(token for chunk in chunks for token in chunk.answer_tokens),
        prompt=chunks[0].prompt,
        finish_reason=last.finish_reason,
        stopped_by=last.stopped_by,
        stats=last.stats,
    )


def api_error_of(error: Exception) -> ApiError:
    """The ApiError for an error of the engine."""
    if isinstance(error, QueueFullError):
        return ApiError(str(error), status=429, code="queue_full", retry_after=2)
    if isinstance(error, ClosedError):
        return ApiError(str(error), status=503, code="shutting_down")
    if isinstance(error, TimeoutError):
        return ApiError(str(error), status=408, code="timeout")
    if isinstance(error, InvalidArgumentError):  # a grammar that no text of this model fits
        return ApiError(str(error), code="invalid_value")
    return ApiError(f"the reply could not be computed: {error}", status=500, code="server_error")


async def full_replies(request: fastapi.Request, stream: ReplyStream) -> list[FullReply]:
    """All replies; cancelled when the client leaves."""

    async def collect() -> list[FullReply]:
        async with stream:
            return await stream.whole()

    return await run_until_disconnect(request, collect())
