"""Replies to many prompts, `width` of them made at a time, each told when it is finished.

What prompts in a row begin with alike, such as the examples before the questions of a subject, is
read once. That changes no answer but by rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

from ..engine import (
    WIDTH,
    Batch,
    LanguageModel,
    Sampling,
)
from ..engine.batching.prefix_cache import common_prefix_length, slice_cache
from ..engine.session import prefill
from ..memory import prefill_chunk
from ..text.tokenizer import Tokenizer
from .outputs import (
    Completion,
    Piece,
    Stats,
    Transcript,
    collect,
)

__all__ = ["BatchRequest", "replies"]

T = TypeVar("T")

SHARED = 64
"""Tokens that are worth to be read apart, for the prompts that begin with them."""


@dataclass(frozen=True, kw_only=True)
class BatchRequest:
    """A prompt, and what its reply may be."""

    ids: Sequence[int]
    max_tokens: int
    """With the prompt no more than the context."""
    sampling: Sampling
    stops: Sequence[str] = ()
    """Strings that end the text before them."""
    enough: Callable[[str], bool] | None = None
    """Whether so much of the text will do: the reply then ends as at a stop string."""

    @property
    def size(self) -> int:
        """Positions of cache that it may take."""
        return len(self.ids) + self.max_tokens


@dataclass
class _Stream:
    """A reply that is being made."""

    place: int
    asked: BatchRequest
    told: Transcript
    start: float
    cached: int
    first: float = 0.0
    pieces: list[Piece] = field(default_factory=list)
    text: str = ""

    def add(self, token: int) -> bool:
        """Take a token; whether the reply ends with it."""
        self.first = self.first or time.perf_counter()
        piece = self.told.add(token)
        self.pieces.append(piece)
        if self.asked.enough and piece.text and not self.told.ended:
            self.text += piece.text
            self.told.ended = self.asked.enough(self.text)
        return self.told.ended

    def completion(self) -> Completion:
        stats = Stats.measure(
            prompt_tokens=len(self.asked.ids),
            cached_tokens=self.cached,
            completion_tokens=self.told.count,
            start=self.start,
            first=self.first,
        )
        return collect([*self.pieces, self.told.finish(stats)])


def replies(
    model: LanguageModel,
    tokenizer: Tokenizer,
    asked: Iterable[BatchRequest],
    width: int = WIDTH,
    *,
    positions: int | None = None,
) -> Generator[tuple[int, Completion], None, None]:
    """The replies with the places of their prompts, each as soon as it is finished.

    Prompts are taken from `asked` as there is room: in `positions` of cache, each taken for as
    long as the longest, a single prompt always (None: no such limit). Seconds count from when a
    prompt was taken. NumericsError where the model produces NaN.
    """
    batch = Batch(model, vocab_size=tokenizer.vocab_size, width=width)
    heads = _Heads(model)
    waiting = _Waiting(enumerate(_paired(asked)))
    streams: dict[int, _Stream] = {}

    def fits(one: BatchRequest) -> bool:
        if not streams or positions is None:
            return len(streams) < 2 * width  # so that none waits for the next to be read
        sizes = [stream.asked.size for stream in streams.values()]
        return (len(sizes) + 1) * max(*sizes, one.size) <= positions and len(sizes) < 2 * width

    with closing(batch):
        while True:
            for place, (one, following) in waiting.taken(lambda entry: fits(entry[1][0])):
                cache = heads.known(one.ids, following)
                number = batch.add(
                    one.ids,
                    max_tokens=one.max_tokens,
                    sampling=one.sampling,
                    eos=tokenizer.eos_ids,
                    cache=cache,
                )
                told, now = Transcript(tokenizer, one.stops), time.perf_counter()
                cached = cache[0].offset if cache else 0
                streams[number] = _Stream(place, one, told, now, cached)
            if not streams:
                return
            for drawn in batch.step():
                drawn.raise_error()
                stream = streams[drawn.stream]
                ended = stream.add(drawn.token)
                if not drawn.finish_reason and not ended:
                    continue
                if not drawn.finish_reason:
                    batch.remove(drawn.stream)
                del streams[drawn.stream]
                yield stream.place, stream.completion()


class _Waiting(Generic[T]):
    """Things in their order, of which the next is looked at before it is taken."""

    def __init__(self, things: Iterator[T]) -> None:
        self.things, self.next = things, list(islice(things, 1))

    def taken(self, fits: Callable[[T], bool]) -> Iterator[T]:
        """Take the next ones, as long as they fit."""
        while self.next and fits(self.next[0]):
            (one,), self.next = self.next, list(islice(self.things, 1))
            yield one


def _paired(asked: Iterable[BatchRequest]) -> Iterator[tuple[BatchRequest, Sequence[int]]]:
    """Each with the ids of the next, of which the last has none."""
    before: BatchRequest | None = None
    for one in asked:
        if before is not None:
            yield before, one.ids
        before = one
    if before is not None:
        yield before, ()


class _Heads:
    """What prompts in a row begin with: the last such beginning, read once."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.threshold = model, model.config.rotation_threshold
        self.ids: list[int] = []
        self.cache: list[Any] = []

    def known(self, ids: Sequence[int], following: Sequence[int]) -> list[Any] | None:
        """Keys and values of what `ids` begin with; read now where the next begin so too."""
        if self.threshold is not None and len(ids) > self.threshold:
            return None  # it is rotated otherwise, by its length
        have = common_prefix_length(self.ids, ids)
        coming = common_prefix_length(ids, following)
        if coming >= have + SHARED:
            self._read(ids[: min(coming, len(ids) - 1)])
            have = len(self.ids)
        have = min(have, len(ids) - 1)
        return slice_cache(self.cache, have) if have >= SHARED else None

    def _read(self, ids: Sequence[int]) -> None:
        from mlx_lm.models.cache import KVCache

        self.ids = list(ids)
        self.cache = [KVCache() for _ in range(self.model.config.num_hidden_layers)]
        chunk = prefill_chunk(self.model.config)
        for _ in prefill(self.model, self.ids, self.cache, chunk=chunk, length=len(ids)):
            pass
