"""One model behind all APIs: its names, prompts, and replies from the scheduler."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
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
from ..errors import InvalidArgumentError, MiniCPMError, MissingTemplateError, TemplateError
from ..lm.lm import LM
from ..lm.sampling import sampling_with
from ..lm.thinking_grammar import thinking_grammar
from ..model.adapters import apply_adapter, share_weights
from ..model.fused import FusedModel
from ..text.chat_prompt import ChatPrompt, chat_prompt
from .http.api_error import ApiError, unsupported
from .reply_stream import (
    Chunk,
    GenerationRequest,
    ReplyState,
    ReplyStream,
    ServedModel,
    api_error_of,
)

WIDTH = 16
"""Requests that run at once, by default."""

QUEUE = 256
"""Requests that wait, at most, by default."""


NO_THINKING = "this model does not think before it answers"


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """The thinking that a request asks for."""

    wanted: bool | None = None
    """None: the chat template decides."""
    tokens: int | None = None
    """Longest thought; None: no limit."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """More that the chat template uses."""
    field: str = "think"
    """The API's name for `wanted`."""


AS_TEMPLATE = Thinking()

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
EFFORTS: dict[str | None, Thinking] = {
    None: AS_TEMPLATE,
    "none": Thinking(wanted=False),
    "minimal": Thinking(wanted=True, tokens=128),
    "low": Thinking(wanted=True, tokens=512),
    "medium": Thinking(wanted=True, tokens=2048),
    "high": Thinking(wanted=True),
    "xhigh": Thinking(wanted=True),
}
"""What the words of OpenAI's API stand for here."""


def by_effort(effort: str | None, field: str) -> Thinking:
    """The thinking that a word asks for; `field` is the API's name for it."""
    return replace(EFFORTS[effort], field=field)


class Service:
    """Serves `lm`, and `lm` with each of `adapters` (folders by name).

    Up to `width` requests run at once and `queue` more wait. Each fails after `timeout` seconds
    and has up to `max_tokens` of reply unless it sets a number itself (None: as far as the context
    goes). Two fifths of the free memory go to the keys and values of running requests, and one
    fifth, or `cache_bytes`, to the prefix cache. Without `embedding_ids`, only texts are embedded.
    Create it on any thread; use it on the thread of an event loop. In a launch whose ranks share
    the model, every rank but the first calls `follow`.
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
        embedding_ids: bool = False,
    ):
        self.embedding_ids = embedding_ids
        self.lm, self.timeout, self.created = lm, timeout, int(time.time())
        self.max_tokens = max_tokens
        base = lm.card.name
        self.models = [ServedModel(name=base, adapter=None)]
        adapted = _load_adapters(lm, adapters or {})
        self.models += [ServedModel(name=f"{base}:{name}", adapter=name) for name in adapted]
        estimate = memory.estimate(lm.config)
        free = collectives.least(max(estimate.available - estimate.working, 0))
        prefixes = PrefixCache(free // 5 if cache_bytes is None else cache_bytes)
        positions = free * 2 // 5 * estimate.context // max(estimate.cache, 1)
        limits = [lm.context_length, positions]
        if lm.config.rotation_threshold is not None:
            # Beyond it the rotation depends on the length of the text, so texts cannot share a
            # batch.
            limits.append(lm.config.rotation_threshold)
        self.context_length = min(limits)
        """Tokens of a prompt and its reply together, at most."""
        self.observers: list[Callable[[Chunk], None]] = []
        """Called with every chunk of every reply."""
        self._streams: dict[Request, tuple[ref[ReplyStream], ReplyState]] = {}
        self._embeddings: dict[Request, asyncio.Future[RequestEvent]] = {}
        self._scheduler = Scheduler(
            {None: lm.model, **adapted},
            self._on_events,
            vocab_size=lm.tokenizer.vocab_size,
            width=width,
            queue=queue,
            max_positions=positions,
            prefixes=prefixes,
            distributed=lm.sharded,
        )
        self.follows = lm.sharded and collectives.rank() > 0
        """Another rank of the launch takes the requests, and this one computes with it."""
        if not self.follows:
            self._scheduler.start()

    def follow(self) -> None:
        """Computes the first rank's requests until that rank ends."""
        self._scheduler.run()

    # Names, prompts and sampling.

    def find_model(self, name: str | None) -> ServedModel:
        """The model of that name; None is the first one. ApiError 404 if there is none."""
        if name is None or name in ("default", f"{self.models[0].name}:latest"):
            return self.models[0]
        for model in self.models:
            if model.name == name:
                return model
        names = ", ".join(model.name for model in self.models)
        raise ApiError(
            f"there is no model {shown(name)} here; there is {names}",
            status=404,
            field="model",
            code="model_not_found",
        )

    def sampling(
        self,
        own_names: Mapping[str, str] | None = None,
        prompt: ChatPrompt | None = None,
        **changes: Any,
    ) -> Sampling:
        """The model's default sampling for `prompt` with the fields that are not None replaced.

        ApiError with the API's `own_names` of fields, where they differ from ours.
        """
        default = self.lm.sampling if prompt is None else self.lm.default_sampling(prompt)
        try:
            return sampling_with(default, **changes)
        except InvalidArgumentError as error:
            name = (own_names or {}).get(error.field or "", error.field)
            problem = error.problem if name is None else f"{name} {error.problem}"
            raise ApiError(problem, field=name) from None

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[Any] | None = None,
        field: str = "messages",
        continues: bool = False,
        thinking: Thinking = AS_TEMPLATE,
    ) -> ChatPrompt:
        """The prompt of a conversation.

        `field` is the API's name for the conversation. With `continues` the last message is the
        beginning of the reply.
        """
        try:
            return chat_prompt(
                self.lm.tokenizer,
                messages,
                tools=tools,
                continues=continues,
                think=thinking.wanted,
                variables=thinking.variables,
            )
        except MissingTemplateError as error:
            advice = "send plain text to /v1/completions"
            raise ApiError(str(error.or_else(advice)), field=field) from None
        except TemplateError as error:
            raise ApiError(str(error), field=field) from None
        except InvalidArgumentError as error:
            if error.field != "think":
                named = "chat_template_kwargs" if error.field in thinking.variables else None
                field = named or thinking.field
                raise ApiError(f"{field}: {error}", field=field) from None
            raise unsupported(thinking.field, NO_THINKING) from None

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, with the beginning of text if the model uses one."""
        return self.lm.tokenizer.encode(text)

    def check_ids(self, ids: Sequence[int], field: str) -> list[int]:
        """`ids` as a list; ApiError with the body's `field` if the model does not have one."""
        size = self.lm.tokenizer.vocab_size
        unknown = next((token for token in ids if not 0 <= token < size), None)
        if unknown is not None:
            raise ApiError(
                f"{field}: token ids must be from 0 to {size - 1}, got {shown(unknown)}",
                field=field,
            )
        return list(ids)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; for a special token, its name."""
        return self.lm.tokenizer.bytes_of(token)

    def token_text(self, token: int) -> str:
        """A token as text; an incomplete character is U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    # Replies.

    def start(self, generations: Sequence[GenerationRequest], field: str = "prompt") -> ReplyStream:
        """Queues all requests or none; ApiError if a prompt is too long or the queue is full.

        `field` is the API's name for the prompt. Later errors are raised by the stream: 408 for a
        reply that took too long, 503 when the server ends.
        """
        requests = [self._request(generation, field) for generation in generations]
        states = [
            ReplyState(self.lm.tokenizer, index, generation, request)
            for index, (generation, request) in enumerate(zip(generations, requests, strict=True))
        ]
        stream = ReplyStream(states, self._cancel, self._observe)
        self._streams.update((state.request, (ref(stream), state)) for state in states)
        try:
            self._submit(requests)
        except ApiError:
            self._forget(requests)
            raise
        return stream

    async def embed(
        self, served: ServedModel, prompts: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """For each prompt, the mean of the last layer's hidden states after the norm."""
        greedy = Sampling()
        generations = [
            GenerationRequest(
                prompt=ChatPrompt(ids=list(ids)), served=served, sampling=greedy, max_tokens=0
            )
            for ids in prompts
        ]
        requests = [self._request(generation, "input", embed=True) for generation in generations]
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[RequestEvent]] = [loop.create_future() for _ in requests]
        self._embeddings.update(zip(requests, futures, strict=True))
        try:
            self._submit(requests)
            events = [await future for future in futures]
        finally:
            self._cancel(requests)
        # The fused model has the divisor in its norm.
        scale = self.lm.config.logit_divisor if isinstance(self.lm.model, FusedModel) else 1
        means = []
        for event in events:
            if isinstance(event, RequestFailed):
                raise api_error_of(event.error)
            assert isinstance(event, PrefillDone)
            means.append([value * scale for value in event.embedding])
        return means

    def _request(self, generation: GenerationRequest, field: str, embed: bool = False) -> Request:
        prompt = generation.prompt.ids
        if not prompt:
            raise ApiError("the prompt is empty; expected at least one token", field=field)
        room = self.context_length - len(prompt)
        if room < (generation.max_tokens != 0):
            raise ApiError(
                f"the prompt has {len(prompt)} tokens and the context is "
                f"{self.context_length}; shorten it to leave room for a reply",
                field=field,
                code="context_length_exceeded",
            )
        if generation.has_end and (generation.min_tokens or generation.ignore_eos):
            raise ApiError(
                "a grammar decides where the reply may end; leave out min_tokens and ignore_eos"
            )
        self.lm.note_length(len(prompt))
        max_tokens = generation.max_tokens
        if max_tokens is None:
            max_tokens = room if self.max_tokens is None else self.max_tokens
        eos = () if generation.ignore_eos else self.lm.tokenizer.eos_ids
        return Request(
            prompt=prompt,
            max_tokens=min(max_tokens, room),
            sampling=generation.sampling,
            adapter=generation.served.adapter,
            eos=frozenset(eos) | frozenset(generation.stop_tokens),
            min_tokens=generation.min_tokens,
            grammar=thinking_grammar(
                self.lm.tokenizer, generation.prompt, generation.think_tokens, generation.grammar
            ),
            top_logprobs=generation.top_logprobs,
            logprob_start=generation.logprob_start,
            embed=embed,
            deadline=None if self.timeout is None else time.monotonic() + self.timeout,
        )

    def _submit(self, requests: Sequence[Request]) -> None:
        try:
            self._scheduler.submit(requests)
        except (QueueFullError, ClosedError) as error:
            raise api_error_of(error) from None

    def _cancel(self, requests: Sequence[Request]) -> None:
        self._forget(requests)
        self._scheduler.cancel(requests)

    def _forget(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._streams.pop(request, None)
            self._embeddings.pop(request, None)

    def _observe(self, chunk: Chunk) -> None:
        for observer in self.observers:
            observer(chunk)

    def _on_events(self, events: Sequence[tuple[Request, RequestEvent]]) -> None:
        """Passes the scheduler's events on; runs on the scheduler's thread."""
        by_stream = defaultdict(list)
        for request, event in events:
            if entry := self._streams.get(request):
                stream_ref, state = entry
                by_stream[stream_ref].append((state, event))
            elif future := self._embeddings.get(request):
                future.get_loop().call_soon_threadsafe(_set_result, future, event)
        for stream_ref, own_events in by_stream.items():
            if stream := stream_ref():
                stream.put(own_events)

    # The server.

    async def flush(self) -> None:
        self._scheduler.flush()

    def state(self) -> dict[str, int]:
        """The load and the limits of the scheduler and its prefix cache."""
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
        """Refuses new requests, lets the present ones finish for `seconds`, and ends."""
        self._scheduler.close(seconds)
        await asyncio.to_thread(self._scheduler.join)


def _load_adapters(lm: LM, folders: Mapping[str, str | Path]) -> dict[str | None, LanguageModel]:
    """The model with each of the adapters; they share its weights."""
    if folders and lm.sharded:
        raise InvalidArgumentError(
            "--adapter: not on a model that several processes share; fuse it first "
            "(minicpm-mlx fuse)"
        )
    adapted: dict[str | None, LanguageModel] = {}
    for name, folder in folders.items():
        adapted[name] = share_weights(lm.model)
        try:
            apply_adapter(adapted[name], lm.read_adapter(Path(folder).expanduser().resolve()))  # type: ignore[arg-type]
        except MiniCPMError as error:
            raise type(error)(f"--adapter {name}: {error}") from None
    return adapted


def _set_result(future: asyncio.Future[RequestEvent], event: RequestEvent) -> None:
    if not future.done():
        future.set_result(event)
