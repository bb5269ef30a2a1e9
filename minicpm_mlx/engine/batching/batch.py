"""Continuous batching with mlx-lm's BatchGenerator: streams join and leave between steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

import mlx.core as mx

from ...errors import NumericsError
from ...memory import PREFILL_CHUNK
from ..draw import UNDECIDED
from ..logprobs import LogprobRows, TokenLogprob
from ..sampling import NOT_A_NUMBER, Sampler, Sampling
from ..session import LanguageModel
from ..token_mask import Grammar
from .requests import Request

WIDTH = 8
"""Default number of streams that advance together."""


class StreamCache(NamedTuple):
    """The tokens a stream has read, with their keys and values."""

    ids: list[int]
    cache: list[Any]
    """One mlx-lm cache a layer."""


class StreamToken(NamedTuple):
    """A token drawn for one stream."""

    stream: int
    token: int
    """NOT_A_NUMBER where none could be drawn."""
    finish_reason: str | None = None
    """"stop" or "length" with the stream's last token."""
    token_logprob: TokenLogprob | None = None
    """Set where the stream was added with `top_logprobs`."""
    cache: StreamCache | None = None
    """Set with the last token."""
    error: Exception | None = None
    """Raised by the stream's grammar."""

    def raise_error(self) -> None:
        """Raise the grammar's error, or NumericsError where the model produced NaN."""
        if self.error:
            raise self.error
        if self.token == NOT_A_NUMBER:
            raise NumericsError(
                "the model produced NaN; expected numbers. Are the weights damaged?"
            )


class Batch:
    """Streams of one model; `step` advances up to `width` of them, and the rest wait."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        vocab_size: int | None = None,
        width: int = WIDTH,
        chunk: int = PREFILL_CHUNK,
        synchronize: Callable[[mx.array], mx.array] | None = None,
    ):
        """`synchronize` maps a drawn token (1,) to the one that all ranks take."""
        # Imported here because it takes the better part of a second.
        from mlx_lm.generate import BatchGenerator

        self.vocab_size = vocab_size or model.config.vocab_size
        self.synchronize = synchronize
        self.samplers: dict[int, _StreamSampler] = {}
        """By BatchGenerator's number, which changes where a stream is inserted again."""
        self.numbers = count()
        self.generator: Any = BatchGenerator(
            model,  # type: ignore[arg-type]
            completion_batch_size=width,
            prefill_batch_size=width,
            prefill_step_size=chunk,
            stream=mx.default_stream(mx.default_device()),
        )

    def add(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        sampling: Sampling,
        eos: Collection[int] = (),
        min_tokens: int = 0,
        grammar: Grammar | None = None,
        top_logprobs: int | None = None,
        cache: list[Any] | None = None,
    ) -> int:
        """Add a stream, which begins when there is room for it; return its number.

        `top_logprobs` asks for each token's log probability and that many of the likeliest tokens.
        `cache` holds keys and values of the prompt's first tokens, not of all (mlx-lm's caches,
        which are not changed).
        """
        sampler = _StreamSampler(
            Sampler(
                sampling, prompt, self.vocab_size, grammar=grammar, eos=eos, min_tokens=min_tokens
            ),
            next(self.numbers),
            max_tokens,
            top_logprobs,
            self.synchronize,
        )
        self._insert(sampler, prompt, cache)
        return sampler.stream

    def _insert(self, sampler: _StreamSampler, ids: Sequence[int], cache: list[Any] | None) -> None:
        from mlx_lm.generate import StopSequences

        cached = cache[0].offset if cache else 0
        (uid,) = self.generator.insert(
            [list(ids[cached:])],
            max_tokens=[sampler.max_tokens],
            caches=[cache],
            all_tokens=[list(ids[:cached])],
            samplers=[sampler],
            logits_processors=[[sampler.process_logits]],
            stop_sequences=[StopSequences([[token] for token in sampler.sampler.eos])],
        )
        self.samplers[int(uid)] = sampler

    def step(self) -> list[StreamToken]:
        """Draw the next token of each running stream, and read more of each waiting prompt.

        Returns no tokens while all streams are still reading.
        """
        _, responses = self.generator.next()
        return [self._stream_token(response) for response in responses]

    def _stream_token(self, response: Any) -> StreamToken:
        sampler = self.samplers[response.uid]
        sampler.max_tokens -= 1
        if response.token == UNDECIDED:
            response = self._decide(response, sampler)
        token_logprob = cache = None
        if sampler.top_logprobs is not None:
            (token_logprob,) = sampler.logprobs.popleft().to_list([response.token])
        if response.finish_reason:
            del self.samplers[response.uid]
            cache = StreamCache(response.all_tokens, response.prompt_cache)
        # The sampler is a step ahead: its error belongs to the token that could not be drawn.
        error = sampler.error if response.token == NOT_A_NUMBER else None
        return StreamToken(
            sampler.stream, response.token, response.finish_reason, token_logprob, cache, error
        )

    def _decide(self, response: Any, sampler: _StreamSampler) -> Any:
        """Draw an undecided token again, and insert its stream again without the step after it."""
        token = sampler.decide()
        reason, ids, cache = response.finish_reason, response.all_tokens, response.prompt_cache
        if reason is None:
            cache, ids = self.generator.extract_cache([response.uid])[response.uid]
            self.generator.remove([response.uid])
        ids = ids[:-1]
        for layer in cache:
            layer.trim(1)
        reason = "stop" if token in sampler.sampler.eos else reason
        if reason is None:
            del self.samplers[response.uid]
            self._insert(sampler, [*ids, token], cache)
        return replace(
            response, token=token, finish_reason=reason, all_tokens=ids, prompt_cache=cache
        )

    def tokens(self) -> Iterator[StreamToken]:
        """Yield the tokens of all streams as they come; NumericsError where the model has NaN."""
        while self.samplers:
            for token in self.step():
                token.raise_error()
                yield token

    def extract(self, stream: int) -> StreamCache:
        """Return a copy of what a stream has read so far."""
        uid = self._uid(stream)
        cache, ids = self.generator.extract_cache([uid])[uid]
        return StreamCache(list(ids), cache)

    def remove(self, stream: int) -> None:
        """End a stream early; nothing where it has ended."""
        uid = self._uid(stream)
        if uid is not None:
            self.generator.remove([uid])
            del self.samplers[uid]

    def _uid(self, stream: int) -> int | None:
        """BatchGenerator's number of a stream; None where it has ended."""
        return next((uid for uid, s in self.samplers.items() if s.stream == stream), None)

    def close(self) -> None:
        self.generator.close()


class _StreamSampler:
    """Draws from the logits themselves, as generate() does for a single stream.

    BatchGenerator samples from log probabilities instead. So the token is drawn earlier, where
    BatchGenerator would have the logits adjusted, and handed over when it asks for a sample.
    """

    def __init__(
        self,
        sampler: Sampler,
        stream: int,
        max_tokens: int,
        top_logprobs: int | None,
        synchronize: Callable[[mx.array], mx.array] | None,
    ):
        self.sampler, self.top_logprobs, self.synchronize = sampler, top_logprobs, synchronize
        self.stream = stream
        self.max_tokens = max_tokens
        """Tokens that may still be returned."""
        self.logprobs: deque[LogprobRows] = deque()
        """Of the tokens drawn and not returned yet."""
        self.error: Exception | None = None
        """Raised by the grammar; the other streams continue."""

    def process_logits(
        self, _: mx.array | None, logits: mx.array, decide: bool = False
    ) -> mx.array:
        """Draw the next token from logits (1, V); the logits returned are not used."""
        self.token = self._draw(logits, decide)
        if self.synchronize:
            self.token = self.synchronize(self.token)
        if self.top_logprobs is not None:
            logits = logits[:, : self.sampler.vocab_size]
            self.logprobs.append(LogprobRows(logits, mx.maximum(self.token, 0), self.top_logprobs))
        return mx.zeros((1, 1))

    def decide(self) -> int:
        """Draw the last token but one again, which was undecided, and drop the last."""
        self.logprobs.clear()
        self.process_logits(None, self.sampler.rewind(2), decide=True)
        return int(self.token.item())  # type: ignore[arg-type]

    def _draw(self, logits: mx.array, decide: bool) -> mx.array:
        if self.error is None:
            try:
                return self.sampler(logits, decide)
            except Exception as error:
                self.error = error
        # Still depends on the logits: the sums between ranks in them must run on every rank.
        return mx.depends(mx.array([NOT_A_NUMBER], mx.int32), logits)

    def __call__(self, _: mx.array) -> mx.array:
        return self.token


class AdapterBatch:
    """The requests that run with one adapter, in a batch that is created when first needed."""

    def __init__(self, model: LanguageModel, create_batch: Callable[[], Batch]):
        self.model, self._create_batch = model, create_batch
        self._batch: Batch | None = None
        self.requests: dict[int, Request] = {}
        """By their stream's number."""

    @property
    def batch(self) -> Batch:
        self._batch = self._batch or self._create_batch()
        return self._batch

    def add(self, request: Request, cache: list[Any] | None) -> None:
        """Start the reply; `cache` holds the prompt but for its last token."""
        stream = self.batch.add(
            request.prompt,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            eos=request.eos,
            min_tokens=request.min_tokens,
            grammar=request.grammar,
            top_logprobs=request.top_logprobs,
            cache=cache,
        )
        self.requests[stream] = request

    def cancel(self, request_ids: set[int]) -> list[tuple[Request, StreamCache]]:
        """End requests early; return them with what they have read."""
        canceled = []
        for stream, request in list(self.requests.items()):
            if request.request_id in request_ids:
                canceled.append((request, self.batch.extract(stream)))
                self.remove(stream)
        return canceled

    def remove(self, stream: int) -> None:
        """End a stream early."""
        self.batch.remove(stream)
        del self.requests[stream]

    def close(self) -> list[Request]:
        """Drop the batch and return the requests that were running in it."""
        requests = list(self.requests.values())
        if self._batch:
            self._batch.close()
        self._batch = None
        self.requests.clear()
        return requests
