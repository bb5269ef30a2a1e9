"""The streams of one model that run together, with what they were asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .batch import Batch, Drawn, Kept
from .generate import LanguageModel
from .prefix import common
from .request import Request

SHARED = 64
"""Tokens that two prompts begin with alike from which on it is worth to read them once."""


@dataclass
class Waiting:
    """A stream that is not in the batch yet."""

    request: Request
    cache: list[Any] | None
    """Of the first tokens of its prompt."""

    @property
    def known(self) -> int:
        return self.cache[0].offset if self.cache else 0

    @property
    def left(self) -> int:
        """Tokens of the prompt that have to be read."""
        return len(self.request.prompt) - self.known


class Lane:
    """Streams of one model (an adapter has its own), in a batch that is made when first needed.

    Prompts are read in their order, as many at once as make up a chunk: the first token of each
    comes sooner so than if all were read a little at a time.
    """

    def __init__(self, model: LanguageModel, make: Callable[[], Batch]):
        self.model, self._make = model, make
        self.batch: Batch | None = None
        self.waiting: list[Waiting] = []
        self.streams: dict[int, Request] = {}
        """Those in the batch, by its number."""
        self.reading: dict[int, Waiting] = {}
        """Those of them whose prompts are being read."""
        self.left: dict[int, int] = {}
        """Tokens of these prompts that have not been read."""
        self.newly_read: dict[int, int] = {}
        """Streams that the last step finished reading, and how much of each was known before."""

    @property
    def requests(self) -> list[Request]:
        return [*(one.request for one in self.waiting), *self.streams.values()]

    def add(self, request: Request, cache: list[Any] | None) -> None:
        """Begin a stream; `cache` holds the first tokens of its prompt."""
        self.waiting.append(Waiting(request, cache))

    def step(self, chunk: int) -> list[Drawn]:
        """The next token of every reply, and up to about `chunk` more tokens of prompts."""
        self.batch = self.batch or self._make()
        while self.waiting and sum(self.left.values()) < chunk:
            self._insert(self.waiting.pop(0))
        drawn = self.batch.step(chunk)
        self.left = {stream: max(left - chunk, 0) for stream, left in self.left.items()}
        for stream in self.batch.read:
            self.newly_read[stream] = self.reading.pop(stream).known
            del self.left[stream]
        return drawn

    def _insert(self, one: Waiting) -> None:
        assert self.batch
        request = one.request
        stream = self.batch.add(
            request.prompt,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            eos=request.eos,
            min_tokens=request.min_tokens,
            grammar=request.grammar,
            top=request.top,
            cache=one.cache,
        )
        self.streams[stream], self.reading[stream], self.left[stream] = request, one, one.left

    @property
    def speaks(self) -> bool:
        """Whether a reply is coming."""
        return len(self.streams) > len(self.reading)

    def soon_known(self, prompt: Sequence[int]) -> int:
        """How much of a prompt's beginning is being read for another stream."""
        others = [one.request.prompt for one in (*self.waiting, *self.reading.values())]
        return max((common(other, prompt) for other in others), default=0)

    @property
    def rate(self) -> float | None:
        """Tokens of prompts that are read in a second, about."""
        return self.batch.rate if self.batch else None

    def kept(self, stream: int) -> Kept:
        """What a stream has read so far, a copy."""
        assert self.batch
        return self.batch.kept(stream)

    def cancel(self, numbers: set[int]) -> list[tuple[Request, Kept]]:
        """End streams early, by their requests' numbers; what those in the batch have read."""
        self.waiting = [one for one in self.waiting if one.request.number not in numbers]
        gone = [stream for stream, one in self.streams.items() if one.number in numbers]
        return [(self.streams[stream], self._kept_at_end(stream)) for stream in gone]

    def _kept_at_end(self, stream: int) -> Kept:
        kept = self.kept(stream)
        self.remove(stream)
        return kept

    def remove(self, stream: int) -> None:
        """End a stream early."""
        assert self.batch
        self.batch.remove(stream)
        self.forget(stream)

    def forget(self, stream: int) -> None:
        """Of a stream that has ended."""
        del self.streams[stream]
        self.reading.pop(stream, None)
        self.left.pop(stream, None)

    def reset(self) -> list[Request]:
        """Give up all streams, whose requests are returned, after something went wrong."""
        lost = self.requests
        self.close()
        return lost

    def close(self) -> None:
        if self.batch:
            self.batch.close()
        self.batch = None
        self.waiting.clear()
        self.streams.clear()
        self.reading.clear()
        self.left.clear()
