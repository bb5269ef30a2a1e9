"""The streams of one model that run together, with what they were asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .batching.batch import Batch, Drawn, Kept
from .batching.requests import Request
from .generate import LanguageModel


class Lane:
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

    def cancel(self, numbers: set[int]) -> list[tuple[Request, Kept]]:
        """End streams early, by their requests' numbers; what they have read."""
        assert self.batch or not self.streams
        gone = [stream for stream, one in self.streams.items() if one.number in numbers]
        return [self._ended(stream) for stream in gone]

    def _ended(self, stream: int) -> tuple[Request, Kept]:
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
