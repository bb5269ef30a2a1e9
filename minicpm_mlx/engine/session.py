"""One stream's key-value cache and the ids it holds, and what the engine asks of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, Protocol

import mlx.core as mx

from ..arguments import shown
from ..errors import InvalidArgumentError
from ..model.config import Config
from .kv_cache import KVCache


class LanguageModel(Protocol):
    """What the engine asks of a model: the twin and the fused form both have it."""

    config: Config
    adapter: str | None

    def hidden(
        self, ids: mx.array, cache: Sequence[Any] | None = None, length: int | None = None
    ) -> mx.array: ...

    def logits(self, hidden: mx.array) -> mx.array: ...


class Session:
    """A key-value cache and the ids in it, so that a text that begins alike need not be read again.

    What is reused was computed from the same ids in the same places: it never changes an answer.
    `kv_bits` (8 or 4) keeps the cache in about half or 28 % of a 16-bit format's memory, which does
    change answers a little.
    """

    def __init__(self, config: Config, kv_bits: int | None = None):
        if kv_bits not in (None, 4, 8):
            raise InvalidArgumentError(f"kv_bits must be 8 or 4, got {shown(kv_bits)}")
        if kv_bits is not None and config.head_dim % 32:
            raise InvalidArgumentError(
                f"kv_bits needs heads of a multiple of 32; this model's are {config.head_dim} wide"
            )
        self.config = config
        self.model: LanguageModel | None = None  # the one that read what is in the cache
        self.adapter: str | None = None  # and what it had on
        self.ids: list[int] = []
        self.cache = [KVCache(kv_bits) for _ in range(config.num_hidden_layers)]
        self.threshold = config.rotation_threshold
        self.length = 0  # of the text its keys were rotated for
        self._busy = Lock()

    @contextmanager
    def reserved(self, model: LanguageModel) -> Iterator[None]:
        """Held while a stream runs: two that wrote to one cache in turn would both be wrong."""
        if not self._busy.acquire(blocking=False):
            raise InvalidArgumentError(
                "this session is in the middle of another stream; finish or close that first, or "
                "give each its own session"
            )
        try:
            known = self.model is None or self.model is model
            if self.config != model.config or not known:
                raise InvalidArgumentError(
                    "this session holds what another model read; make one with session() of the "
                    "model it is for"
                )
            self.model = model
            yield
        finally:
            self._busy.release()

    def common(self, ids: Sequence[int]) -> int:
        """How many of `ids` are in the cache and need not be read."""
        if self.model is not None and self.adapter != self.model.adapter:
            return 0
        if self.threshold is not None and max(len(ids), self.length) > self.threshold:
            return 0  # a text of another length was rotated otherwise
        pairs = enumerate(zip(self.ids, ids, strict=False))
        alike = next((i for i, (known, wanted) in pairs if known != wanted), len(self.ids))
        return min(alike, len(ids) - 1)  # the last id is read anew, for its logits

    def rewind(self, ids: Sequence[int]) -> int:
        """Forget all but what `ids` begins with; how many of them need not be read."""
        common = self.common(ids)
        # By offset rather than by ids: an interrupted step may have written more than it noted.
        for layer in self.cache:
            layer.trim(layer.offset - common)
        del self.ids[common:]
        if self.model is not None:
            self.adapter = self.model.adapter
        return common

    def read(self, model: LanguageModel, ids: Sequence[int], length: int) -> mx.array:
        """Feed `ids`, the next of a text of `length`; the last hidden state (1, 1, hidden)."""
        hidden = model.hidden(mx.array([ids]), self.cache, length)[:, -1:]
        mx.eval(hidden, [layer.state for layer in self.cache])
        self.ids.extend(ids)
        self.length = length
        return hidden
