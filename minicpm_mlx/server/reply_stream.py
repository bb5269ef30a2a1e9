"""What becomes of requests, as text, for a client that waits on the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

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
from ..text.tokenizer import Tokenizer
from .http.api_error import ApiError
from .http.streaming import answered


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A name that clients may ask for."""

    name: str
    adapter: str | None
    """The adapter's name; None is the model as it is."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One reply that is wanted."""

    prompt: Sequence[int]
    served: ServedModel
    sampling: Sampling
    max_tokens: int | None = None
    """None: the service's own number. 0: the prompt is read and nothing said."""
    min_tokens: int = 0
    """No end of text before this many."""
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    """They end the reply, besides the model's own."""
    ignore_eos: bool = False
    keep_special: bool = False
    """Special tokens appear in the text."""
    top_logprobs: int | None = None
    """Log probabilities of the tokens, and of this many of the likeliest; None: none."""
    score_from: int | None = None
    """Log probabilities of the prompt's tokens too, from this position on."""
    grammar: Grammar | None = None
    """Only what it allows is said."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """The next bit of a reply."""

    index: int
    """Of the Ask it belongs to."""
    text: str = ""
    """Text that is certain: whole characters, and no part of a stop string."""
    tokens: tuple[TokenLogprob, ...] = ()
    """Tokens read since the last part, end of text not counted."""
    pause: float | None = None
    """Seconds since the token before; None for the first, and for a part without a token."""
    prompt: tuple[TokenLogprob, ...] = ()
    """In the first part where `score_from` was given: the prompt's tokens from there on."""
    finish_reason: str | None = None
    """In the last part: "stop" or "length"."""
    stopped_by: str | None = None
    """In the last part: the stop string that came."""
    stats: Stats | None = None
    """In the last part."""


@dataclass(frozen=True, kw_only=True)
class FullReply:
    """All parts of a reply joined."""

    text: str
    tokens: tuple[TokenLogprob, ...]
    prompt: tuple[TokenLogprob, ...]
    finish_reason: str
    stopped_by: str | None
    stats: Stats


class ReplyState:
    """One reply on its way: events of the scheduler to parts."""

    def __init__(self, tokenizer: Tokenizer, index: int, ask: GenerationRequest, request: Request):
        self.index, self.ask, self.request = index, ask, request
        self.transcript = Transcript(
            tokenizer, ask.stop, eos=request.eos, skip_special=not ask.keep_special
        )
        self.begun, self.first, self.latest, self.cached = time.perf_counter(), 0.0, 0.0, 0

    def parts(self, event: RequestEvent) -> list[Chunk]:
        """What an event makes certain; ApiError where nothing will come of it."""
        if isinstance(event, RequestFailed):
            raise refusal_of(event.error)
        if isinstance(event, PrefillDone):
            self.cached = event.cached_tokens
            prompt = event.prompt_logprobs
            parts = [Chunk(index=self.index, prompt=prompt)] if prompt or event.final else []
            return [*parts, self._last()] if event.final else parts
        now = time.perf_counter()
        pause = now - self.latest if self.latest else None
        self.first, self.latest = self.first or now, now
        piece = self.transcript.add(event.token_logprob.token)
        tokens = (event.token_logprob,) if piece.token_ids else ()
        parts = []
        if tokens:
            parts = [Chunk(index=self.index, text=piece.text, tokens=tokens, pause=pause)]
        return [*parts, self._last()] if event.finish_reason or self.transcript.ended else parts

    def _last(self) -> Chunk:
        stats = Stats.measure(
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.cached,
            completion_tokens=self.transcript.count,
            start=self.begun,
            first=self.first,
        )
        piece = self.transcript.finish(stats)
        return Chunk(
            index=self.index,
            text=piece.text,
            finish_reason=piece.finish_reason,
            stopped_by=self.transcript.text.found,
            stats=stats,
        )


class Replies:
    """Replies on their way: `async for part in replies`, or `await replies.whole()`.

    `async with replies:` gives up what has not come yet when the block is left; so does dropping
    them, as a stream is whose client left before it began.
    """

    def __init__(
        self,
        voices: Sequence[ReplyState],
        cancel: Callable[[Sequence[Request]], None],
        watch: Callable[[Chunk], None],
    ):
        self._voices = list(voices)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[ReplyState, RequestEvent]] = asyncio.Queue()
        self._cancel, self._watch = cancel, watch

    def hear(self, told: Sequence[tuple[ReplyState, RequestEvent]]) -> None:
        """Take events in, from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._take, told)
        except RuntimeError:  # the loop has ended, and who would listen with it
            self._cancel([voice.request for voice in self._voices])

    def _take(self, told: Sequence[tuple[ReplyState, RequestEvent]]) -> None:
        for one in told:
            self._events.put_nowait(one)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while self._voices:
            voice, event = await self._events.get()
            if voice not in self._voices:
                continue  # it said its last word
            for part in voice.parts(event):
                if part.finish_reason:
                    self._voices.remove(voice)
                    self._cancel([voice.request])
                self._watch(part)
                yield part

    async def whole(self) -> list[FullReply]:
        """All replies, in the order in which they were asked for."""
        count = len(self._voices)
        parts: list[list[Chunk]] = [[] for _ in range(count)]
        async with self:
            async for part in self:
                parts[part.index].append(part)
        return [_joined(one) for one in parts]

    async def __aenter__(self) -> Replies:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up what has not come yet."""
        if self._voices:
            self._cancel([voice.request for voice in self._voices])
            self._voices.clear()

    __del__ = close


def _joined(parts: Sequence[Chunk]) -> FullReply:
    last = parts[-1]
    assert last.finish_reason
    assert last.stats
    return FullReply(
        text="".join(part.text for part in parts),
        tokens=tuple(token for part in parts for token in part.tokens),
        prompt=parts[0].prompt,
        finish_reason=last.finish_reason,
        stopped_by=last.stopped_by,
        stats=last.stats,
    )


def refusal_of(error: Exception) -> ApiError:
    """What a client is told of an error of the engine."""
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", retry_after=2)
    if isinstance(error, ClosedError):
        return ApiError(503, str(error), code="shutting_down")
    if isinstance(error, TimeoutError):
        return ApiError(408, str(error), code="timeout")
    if isinstance(error, InvalidArgumentError):  # a grammar that no text of this model fits
        return ApiError(400, str(error), code="invalid_value")
    return ApiError(500, f"the reply could not be computed: {error}", code="server_error")


async def wholes(request: fastapi.Request, replies: Replies) -> list[FullReply]:
    """All replies, which are given up when the client leaves."""

    async def work() -> list[FullReply]:
        async with replies:
            return await replies.whole()

    return await answered(request, work())
