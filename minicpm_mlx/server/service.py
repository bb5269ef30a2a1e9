"""One model behind all APIs: names, prompts, and replies from the scheduler."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import ref

from .. import memory
from ..arguments import shown
from ..distributed import collectives
from ..engine import (
    ClosedError,
    LanguageModel,
    PrefillDone,
    PrefixCache,
    QueueFullError,
    Request,
    RequestEvent,
    RequestFailed,
    Sampling,
    Scheduler,
)
from ..errors import InvalidArgumentError, MiniCPMError, TemplateError
from ..lm.lm import LM, sampling_with
from ..model.adapters import apply_adapter, share_weights
from ..model.fused import FusedModel
from ..weights.adapters import read_adapter
from .http.api_error import ApiError
from .reply_stream import (
    Chunk,
    FullReply,
    GenerationRequest,
    Replies,
    ReplyState,
    ServedModel,
    refusal_of,
)

__all__ = ["Chunk", "FullReply", "GenerationRequest", "Replies", "ServedModel", "Service"]

WIDTH = 16
"""Requests that run at once, unless told otherwise."""

QUEUE = 256
"""Requests that wait, at most, unless told otherwise."""


class Service:
    """Answers for `lm`, and for it with each of `adapters` (a folder by its name).

    Up to `width` requests run at once and `queue` more wait; each is given up after `timeout`
    seconds, and has up to `max_tokens` of reply where it says no number itself (None: as far as
    the context goes). Memory that is free is shared out: two fifths to the keys and values of what
    runs, one fifth, or `cache_bytes`, to those of what was read before. Made on any thread; used on
    that of an event loop. Of the ranks of a launch that share the model, all but the first
    `follow`.
    """

    def __init__(
        self,
        lm: LM,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        width: int = WIDTH,
        queue: int = QUEUE,
        cache_bytes: int | None = None,
        timeout: float | None = None,
        max_tokens: int | None = None,
    ):
        self.lm, self.timeout, self.created = lm, timeout, int(time.time())
        self.max_tokens = max_tokens
        base = lm.card.name
        self.names = [ServedModel(name=base, adapter=None)]
        models: dict[str | None, LanguageModel] = {None: lm.model}
        if adapters and lm.sharded:
            raise InvalidArgumentError(
                "--adapter: not on a model that several processes share; fuse it first "
                "(minicpm-mlx fuse)"
            )
        for name, folder in (adapters or {}).items():
            models[name] = share_weights(lm.model)
            try:
                apply_adapter(models[name], read_adapter(Path(folder).expanduser().resolve()))  # type: ignore[arg-type]
            except MiniCPMError as error:
                raise type(error)(f"--adapter {name}: {error}") from None
            self.names.append(ServedModel(name=f"{base}:{name}", adapter=name))
        plan = memory.estimate(lm.config)
        left = collectives.least(max(plan.available - plan.working, 0))
        prefixes = PrefixCache(left // 5 if cache_bytes is None else cache_bytes)
        positions = left * 2 // 5 * plan.context // max(plan.cache, 1)
        limits = [lm.context_length, positions]
        if lm.config.rotation_threshold is not None:
            # Beyond it each length of text is rotated otherwise, so that none can run together.
            limits.append(lm.config.rotation_threshold)
        self.context_length = min(limits)
        """Tokens that a prompt and its reply may have together."""
        self.observers: list[Callable[[Chunk], None]] = []
        """Called with every part of every reply."""
        self._voices: dict[Request, tuple[ref[Replies], ReplyState]] = {}
        self._pools: dict[Request, asyncio.Future[RequestEvent]] = {}
        self._scheduler = Scheduler(
            models,
            self._told,
            vocab_size=lm.tokenizer.vocab_size,
            width=width,
            queue=queue,
            max_positions=positions,
            prefixes=prefixes,
            distributed=lm.sharded,
        )
        self.follows = lm.sharded and collectives.rank() > 0
        """Another rank of the launch is asked, and this one computes with it."""
        if not self.follows:
            self._scheduler.start()

    def follow(self) -> None:
        """Compute what the first rank is asked, until it ends."""
        self._scheduler.run()

    # Names, prompts and settings.

    def served(self, name: str | None) -> ServedModel:
        """Who answers to a name; None: the model itself. ApiError where nobody does."""
        if name is None or name in ("default", f"{self.names[0].name}:latest"):
            return self.names[0]
        for one in self.names:
            if one.name == name:
                return one
        raise ApiError(
            404,
            f"there is no model {shown(name)} here; there is "
            f"{', '.join(one.name for one in self.names)}",
            field="model",
            code="model_not_found",
        )

    def sampling(self, **given: Any) -> Sampling:
        """The model's own, with the fields that are not None replaced."""
        try:
            return sampling_with(self.lm.sampling, **given)
        except InvalidArgumentError as error:
            raise ApiError(400, str(error), field=error.field) from None

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None
    ) -> tuple[list[int], list[str]]:
        """Prompt ids of a conversation, and the template's own stop strings."""
        tokenizer = self.lm.tokenizer
        try:
            ids = tokenizer.chat_ids(messages, tools=tools)
        except TemplateError as error:
            raise ApiError(400, str(error), field="messages") from None
        return ids, list(tokenizer.template.stop_strings) if tokenizer.template else []

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with a beginning of text where the model wants one."""
        return self.lm.tokenizer.encode(text)

    def check_ids(self, ids: Sequence[int], field: str) -> list[int]:
        """The same ids; ApiError for any that the model has not, which names the body's `field`."""
        most = self.lm.tokenizer.vocab_size
        wrong = next((one for one in ids if not 0 <= one < most), None)
        if wrong is not None:
            raise ApiError(
                400,
                f"{field}: token ids must be from 0 to {most - 1}, got {shown(wrong)}",
                field=field,
            )
        return list(ids)

    def bytes_of(self, token: int) -> bytes:
        """What one token stands for; a special one, its name."""
        return self.lm.tokenizer.bytes_of(token)

    def text_of(self, token: int) -> str:
        """One token as text; half a character is U+FFFD."""
        return self.bytes_of(token).decode("utf-8", "replace")

    # Replies.

    def start(self, asks: Sequence[GenerationRequest], field: str = "prompt") -> Replies:
        """Queue them, all or none; ApiError where a prompt is too long or the queue is full.

        `field` is what the API calls the prompt. Later trouble is raised by iterating: 408 for a
        reply that took too long, 503 at the end of the server.
        """
        requests = [self._request(ask, field) for ask in asks]
        tokenizer = self.lm.tokenizer
        pairs = enumerate(zip(asks, requests, strict=True))
        voices = [ReplyState(tokenizer, i, ask, request) for i, (ask, request) in pairs]
        replies = Replies(voices, self._cancel, self._watch)
        self._voices.update((voice.request, (ref(replies), voice)) for voice in voices)
        try:
            self._submit(requests)
        except ApiError:
            self._forget(requests)
            raise
        return replies

    async def embed(
        self, served: ServedModel, prompts: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """For each prompt the mean of the last layer's hidden states, after the norm."""
        greedy = Sampling()
        asks = [
            GenerationRequest(prompt=ids, served=served, sampling=greedy, max_tokens=0)
            for ids in prompts
        ]
        requests = [self._request(ask, "input", embed=True) for ask in asks]
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[RequestEvent]] = [loop.create_future() for _ in requests]
        self._pools.update(zip(requests, futures, strict=True))
        try:
            self._submit(requests)
            events = [await future for future in futures]
        finally:
            self._cancel(requests)
        # The fused form has the divisor in its norm.
        scale = self.lm.config.logit_divisor if isinstance(self.lm.model, FusedModel) else 1
        means = []
        for event in events:
            if isinstance(event, RequestFailed):
                raise refusal_of(event.error)
            assert isinstance(event, PrefillDone)
            means.append([value * scale for value in event.embedding])
        return means

    def _request(self, ask: GenerationRequest, field: str, embed: bool = False) -> Request:
        if not ask.prompt:
            raise ApiError(400, "the prompt is empty; expected at least one token", field=field)
        room = self.context_length - len(ask.prompt)
        if room < (ask.max_tokens != 0):
            raise ApiError(
                400,
                f"the prompt has {len(ask.prompt)} tokens and the context is "
                f"{self.context_length}; shorten it to leave room for a reply",
                field=field,
                code="context_length_exceeded",
            )
        if ask.grammar and (ask.min_tokens or ask.ignore_eos):
            raise ApiError(
                400, "a form for the reply says itself where it may end; leave out others"
            )
        wanted = self.max_tokens if ask.max_tokens is None else ask.max_tokens
        own = () if ask.ignore_eos else self.lm.tokenizer.eos_ids
        return Request(
            prompt=ask.prompt,
            max_tokens=room if wanted is None else min(wanted, room),
            sampling=ask.sampling,
            adapter=ask.served.adapter,
            eos=frozenset(own) | frozenset(ask.stop_tokens),
            min_tokens=ask.min_tokens,
            grammar=ask.grammar,
            top_logprobs=ask.top_logprobs,
            logprob_start=ask.score_from,
            embed=embed,
            deadline=None if self.timeout is None else time.monotonic() + self.timeout,
        )

    def _submit(self, requests: Sequence[Request]) -> None:
        try:
            self._scheduler.submit(requests)
        except (QueueFullError, ClosedError) as error:
            raise refusal_of(error) from None

    def _cancel(self, requests: Sequence[Request]) -> None:
        self._forget(requests)
        self._scheduler.cancel(requests)

    def _forget(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._voices.pop(request, None)
            self._pools.pop(request, None)

    def _watch(self, part: Chunk) -> None:
        for observer in self.observers:
            observer(part)

    def _told(self, told: Sequence[tuple[Request, RequestEvent]]) -> None:
        """What the scheduler says, on its thread."""
        heard = defaultdict(list)
        for request, event in told:
            if found := self._voices.get(request):
                replies, voice = found
                heard[replies].append((voice, event))
            elif future := self._pools.get(request):
                future.get_loop().call_soon_threadsafe(_settle, future, event)
        for listener, events in heard.items():
            if listening := listener():
                listening.hear(events)

    # The whole.

    async def flush(self) -> None:
        """Forget what was read before."""
        self._scheduler.flush()

    def state(self) -> dict[str, int]:
        """How busy it is."""
        scheduler = self._scheduler
        return {
            "running": scheduler.running_count,
            "waiting": scheduler.waiting_count,
            "width": scheduler.width,
            "positions": scheduler.max_positions,
            "cached_texts": len(scheduler.prefixes),
            "cached_bytes": scheduler.prefixes.nbytes,
            "cache_limit": scheduler.prefixes.limit,
        }

    async def close(self, seconds: float = 0) -> None:
        """Take no more requests, let those there are finish for `seconds`, and end."""
        self._scheduler.close(seconds)
        await asyncio.to_thread(self._scheduler.join)


def _settle(future: asyncio.Future[RequestEvent], event: RequestEvent) -> None:
    if not future.done():
        future.set_result(event)
