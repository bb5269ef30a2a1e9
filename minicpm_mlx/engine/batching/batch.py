"""Many streams at once, joining and leaving as they come and end: mlx-lm's BatchGenerator."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from ...errors import NumericsError
from ...memory import CHUNK
from ..grammar import Grammar
from ..logprobs import Scored, Scores
from ..sampling import NOT_A_NUMBER, Sampler, Sampling
from ..session import LanguageModel
from .requests import Request

WIDTH = 8
"""Streams that advance together, unless told otherwise."""


class StreamCache(NamedTuple):
    """What a stream has read."""

    ids: list[int]
    cache: list[Any]
    """Their keys and values, a cache a layer, mlx-lm's."""


class Drawn(NamedTuple):
    """A token of one stream."""

    stream: int
    token: int
    """NOT_A_NUMBER where none could be drawn."""
    reason: str | None
    """"stop" or "length" where it is the stream's last."""
    scored: Scored | None = None
    """The token with its log probability, where the stream was added with `top`."""
    kept: StreamCache | None = None
    """With the last token."""
    error: Exception | None = None
    """What the stream's grammar raised."""

    def check(self) -> None:
        """Raise what went wrong: NumericsError where the model produced NaN."""
        if self.error:
            raise self.error
        if self.token == NOT_A_NUMBER:
            raise NumericsError(
                "the model produced NaN; expected numbers. Are the weights damaged?"
            )


class Batch:
    """Streams of one model; `step` advances all that run, up to `width`, and the rest wait."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        vocab_size: int | None = None,
        width: int = WIDTH,
        chunk: int = CHUNK,
        agree: Callable[[mx.array], mx.array] | None = None,
    ):
        """`agree` makes of a token (1,) that was drawn the one that is taken."""
        # Here, since importing it takes the better part of a second.
        from mlx_lm.generate import BatchGenerator

        self.vocab_size = vocab_size or model.config.vocab_size
        self.agree = agree
        self.draws: dict[int, _Draw] = {}
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
        top: int | None = None,
        cache: list[Any] | None = None,
    ) -> int:
        """Begin a stream when there is room for it; its number.

        `top` asks for each token's log probability and those of the `top` likeliest. `cache` holds
        keys and values of the prompt's first tokens, fewer than all (mlx-lm's caches, not changed).
        """
        from mlx_lm.generate import StopSequences

        known = cache[0].offset if cache else 0
        sampler = Sampler(
            sampling, prompt, self.vocab_size, grammar=grammar, eos=eos, min_tokens=min_tokens
        )
        draw = _Draw(sampler, top, self.agree)
        (number,) = self.generator.insert(
            [list(prompt[known:])],
            max_tokens=[max_tokens],
            caches=[cache],
            all_tokens=[list(prompt[:known])],
            samplers=[draw],
            logits_processors=[[draw.adjust]],
            stop_sequences=[StopSequences([[token] for token in eos])],
        )
        self.draws[int(number)] = draw
        return int(number)

    def step(self) -> list[Drawn]:
        """The next token of each stream that runs, and more of each prompt that is being read; no
        tokens while all are."""
        _, tokens = self.generator.next()
        return [self._drawn(found) for found in tokens]

    def _drawn(self, found: Any) -> Drawn:
        draw = self.draws[found.uid]
        scored = draw.scores.popleft().of(found.token) if draw.top is not None else None
        kept = None
        if found.finish_reason:
            del self.draws[found.uid]
            kept = StreamCache(found.all_tokens, found.prompt_cache)
        error = draw.error if found.token == NOT_A_NUMBER else None
        return Drawn(found.uid, found.token, found.finish_reason, scored, kept, error)

    def tokens(self) -> Iterator[Drawn]:
        """All tokens of all streams as they come; NumericsError where the model produces NaN."""
        while self.draws:
            for drawn in self.step():
                drawn.check()
                yield drawn

    def kept(self, stream: int) -> StreamCache:
        """What a stream has read so far, a copy."""
        cache, ids = self.generator.extract_cache([stream])[stream]
        return StreamCache(list(ids), cache)

    def remove(self, stream: int) -> None:
        """End a stream early."""
        self.generator.remove([stream])
        self.draws.pop(stream, None)

    def close(self) -> None:
        self.generator.close()


class _Draw:
    """Draws from the logits themselves, as a stream of its own would.

    BatchGenerator draws from their logarithms instead; so the token is drawn where it would have
    logits adjusted, which are then no longer needed.
    """

    def __init__(
        self, sampler: Sampler, top: int | None, agree: Callable[[mx.array], mx.array] | None
    ):
        self.sampler, self.top, self.agree = sampler, top, agree
        self.scores: deque[Scores] = deque()
        """Of the tokens drawn and not told yet."""
        self.error: Exception | None = None
        """What the grammar raised; the other streams go on."""

    def adjust(self, _: mx.array, logits: mx.array) -> mx.array:
        self.token = self._next(logits)
        if self.agree:
            self.token = self.agree(self.token)
        if self.top is not None:
            logits = logits[:, : self.sampler.vocab_size]
            self.scores.append(Scores(logits, mx.maximum(self.token, 0), self.top))
        return mx.zeros((1, 1))

    def _next(self, logits: mx.array) -> mx.array:
        if self.error is None:
            try:
                return self.sampler(logits)
            except Exception as error:
                self.error = error
        # The logits are waited for nevertheless: other ranks do too.
        return mx.depends(mx.array([NOT_A_NUMBER], mx.int32), logits)

    def __call__(self, _: mx.array) -> mx.array:
        return self.token


class AdapterBatch:
    """Streams of one model (an adapter has its own), in a batch that is made when first needed."""

    def __init__(self, model: LanguageModel, make: Callable[[], Batch]):
        self.model, self._make = model, make
        self.batch: Batch | None = None
        self.streams: dict[int, Request] = {}

    def add(self, request: Request, cache: list[Any] | None) -> None:
        """Begin a stream; `cache` holds its prompt but for the last token."""
        self.batch = self.batch or self._make()
        stream = self.batch.add(
            request.prompt,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            eos=request.eos,
            min_tokens=request.min_tokens,
            grammar=request.grammar,
            top=request.top,
            cache=cache,
        )
        self.streams[stream] = request

    def step(self) -> list[Drawn]:
        """The next token of every stream."""
        assert self.batch
        return self.batch.step()

    def cancel(self, numbers: set[int]) -> list[tuple[Request, StreamCache]]:
        """End streams early, by their requests' numbers; what they have read."""
        assert self.batch or not self.streams
        gone = [stream for stream, one in self.streams.items() if one.number in numbers]
        return [self._ended(stream) for stream in gone]

    def _ended(self, stream: int) -> tuple[Request, StreamCache]:
        assert self.batch
        request, kept = self.streams[stream], self.batch.kept(stream)
        self.remove(stream)
        return request, kept

    def remove(self, stream: int) -> None:
        """End a stream early."""
        assert self.batch
        self.batch.remove(stream)
        del self.streams[stream]

    def reset(self) -> list[Request]:
        """Give up all streams, whose requests are returned, after something went wrong."""
        lost = list(self.streams.values())
        self.close()
        return lost

    def close(self) -> None:
        if self.batch:
            self.batch.close()
        self.batch = None
        self.streams.clear()
