"""A stream's key-value cache with the ids in it; the model protocol; chunked prefill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, Protocol

import mlx.core as mx

from ..arguments import shown
from ..errors import InvalidArgumentError
from ..model.attention import Cache
from ..model.config import Config
from .kv_cache import KVCache


class LanguageModel(Protocol):
    """The interface of models here; the reference model and its fused form both have it."""

    config: Config
    adapter: str | None

    def hidden(
        self, ids: mx.array, cache: Sequence[Cache] | None = None, length: int | None = None
    ) -> mx.array: ...

    def logits(self, hidden: mx.array) -> mx.array: ...


class Session:
    """A key-value cache and the ids in it, so that a text that begins alike is not read again.

    Reused keys and values were computed from the same ids at the same positions: they never change
    an answer. `kv_bits` (8 or 4) quantizes the cache to about half or 28 % of a 16-bit format's
    memory, which does change answers a little.
    """

    def __init__(self, config: Config, kv_bits: int | None = None):
        if kv_bits not in (None, 4, 8):
            raise InvalidArgumentError(f"kv_bits must be 8 or 4, got {shown(kv_bits)}")
        _, *widths = config.cache_shape
        if kv_bits is not None and any(width % 32 for width in widths):
            raise InvalidArgumentError(
                "kv_bits needs heads of a multiple of 32; this model's are "
                f"{' and '.join(map(str, sorted(set(widths))))} wide"
            )
        self.config = config
        # The model that filled the cache, and the adapter it then had.
        self.model: LanguageModel | None = None
        self.adapter: str | None = None
        self.ids: list[int] = []
        self.cache = [KVCache(kv_bits) for _ in range(config.num_hidden_layers)]
        self.threshold = config.rotation_threshold
        self.length = 0  # of the text that the keys were rotated for
        self._busy = Lock()

    @contextmanager
    def reserved(self, model: LanguageModel) -> Iterator[None]:
        """Reserve the session for one stream: two that write to one cache would both be wrong."""
        if not self._busy.acquire(blocking=False):
            raise InvalidArgumentError(
                "this session is in the middle of another stream; finish or close that first, or "
                "give each its own session"
            )
        try:
            # By identity: modules compare their arrays, which have no truth value.
            held_by_another = self.model is not None and self.model is not model
            if held_by_another or self.config != model.config:
                raise InvalidArgumentError(
                    "this session holds what another model read; make one with session() of the "
                    "model it is for"
                )
            self.model = model
            yield
        finally:
            self._busy.release()

    def common(self, ids: Sequence[int]) -> int:
        """Return how many of `ids` are in the cache and need not be read."""
        if self.model is not None and self.adapter != self.model.adapter:
            return 0
        if self.threshold is not None and max(len(ids), self.length) > self.threshold:
            return 0  # the keys of a text of another length are rotated differently
        pairs = enumerate(zip(self.ids, ids, strict=False))
        common = next((i for i, (cached, new) in pairs if cached != new), len(self.ids))
        return min(common, len(ids) - 1)  # the last id is read again, for its logits

    def rewind(self, ids: Sequence[int]) -> int:
        """Drop all but the common beginning with `ids`; return its length."""
        common = self.common(ids)
        # By offset, not by ids: an interrupted step may have written more than it recorded.
        for layer in self.cache:
            layer.trim(layer.offset - common)
        del self.ids[common:]
        if self.model is not None:
            self.adapter = self.model.adapter
        return common

    def prefill(
        self, model: LanguageModel, ids: Sequence[int], length: int, chunk: int
    ) -> Iterator[mx.array]:
        """Read `ids`, the next of a text of `length`; see `prefill`."""
        for hidden in prefill(model, ids, self.cache, chunk=chunk, length=length):
            self.ids.extend(ids[:chunk])
            ids = ids[chunk:]
            self.length = length
            yield hidden


def prefill(
    model: LanguageModel,
    ids: Sequence[int],
    cache: Sequence[Any],
    *,
    chunk: int,
    length: int | None = None,
) -> Iterator[mx.array]:
    """Read `ids` into `cache`, `chunk` at a time; yield the last hidden states (1, T, hidden).

    The cache is evaluated before each yield. The hidden states are not: few callers need them all.
    `length` is that of the whole text, for models whose rotation depends on it.
    """
    for begin in range(0, len(ids), chunk):
        hidden = model.hidden(mx.array([ids[begin : begin + chunk]]), cache, length)
        mx.eval([layer.state for layer in cache])
        yield hidden
