"""The streams of one model that run together, with what they were asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .batch import Batch, Drawn, Kept
from .generate import LanguageModel
from .prefix import common
from .request import Request

SHARED = 64
"""Tokens that two prompts begin with alike from which on it is worth to read them once."""


class Lane:
    """Streams of one model (an adapter has its own), in a batch that is made when first needed."""

    def __init__(self, model: LanguageModel, make: Callable[[], Batch]):
        self.model, self._make = model, make
        self.batch: Batch | None = None
        self.streams: dict[int, Request] = {}
        self.reading: dict[int, int] = {}
        """Streams whose prompts are being read, and how much of each was known."""
        self.newly_read: dict[int, int] = {}
        """Those that the last step finished reading."""

    def add(self, request: Request, cache: list[Any] | None) -> None:
        """Begin a stream; `cache` holds the first tokens of its prompt."""
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
        self.reading[stream] = cache[0].offset if cache else 0

    def step(self, chunk: int) -> list[Drawn]:
        """The next tokens, as `Batch.step`."""
        assert self.batch
        drawn = self.batch.step(chunk)
        self.newly_read = {one: self.reading.pop(one) for one in self.batch.read}
        return drawn

    def soon_known(self, prompt: Sequence[int]) -> int:
        """How much of a prompt's beginning is being read for another stream."""
        others = (self.streams[stream].prompt for stream in self.reading)
        return max((common(other, prompt) for other in others), default=0)

    @property
    def rate(self) -> float | None:
        """Tokens of prompts that are read in a second, about."""
        return self.batch.rate if self.batch else None

    def kept(self, stream: int) -> Kept:
        """What a stream has read so far, a copy."""
        assert self.batch
        return self.batch.kept(stream)

    def remove(self, stream: int) -> None:
        """End a stream early."""
        assert self.batch
        self.batch.remove(stream)
        self.forget(stream)

    def forget(self, stream: int) -> None:
        """Of a stream that has ended."""
        del self.streams[stream]
        self.reading.pop(stream, None)

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
        self.reading.clear()
