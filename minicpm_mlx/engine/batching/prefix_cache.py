"""The prefix cache: an LRU of KV caches, reused by prompts that begin with the same tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

Key = tuple[Hashable, tuple[int, ...]]
"""An adapter, and the token ids read with it."""


MAX_ENTRIES = 256
"""Texts kept at most; each request is compared with all of them."""


class PrefixCache:
    """The most recently used texts that fit into `limit` bytes.

    Reused keys and values were computed from the same tokens at the same positions: they change no
    answer but by rounding, where they were computed beside other streams.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes = 0
        self._entries: OrderedDict[Key, tuple[np.ndarray, list[Any]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def match_length(self, adapter: Hashable, ids: Sequence[int]) -> int:
        """Return how many of the first `ids` are cached."""
        return self._longest_match(adapter, ids)[0]

    def take(self, adapter: Hashable, ids: Sequence[int]) -> list[Any] | None:
        """Return keys and values of the longest cached beginning of `ids`; None where none is.

        One cache a layer, mlx-lm's, whose offset is the number of tokens. It shares its arrays with
        the entry and must not be written to.
        """
        count, key = self._longest_match(adapter, ids)
        if key is None:
            return None
        self._entries.move_to_end(key)
        return slice_cache(self._entries[key][1], count)

    def _longest_match(self, adapter: Hashable, ids: Sequence[int]) -> tuple[int, Key | None]:
        query, best, best_key = np.array(ids, np.int64), 0, None
        for key, (tokens, _) in self._entries.items():
            if key[0] == adapter and (count := common_prefix_length(tokens, query)) > best:
                best, best_key = count, key
        return best, best_key

    def insert(self, adapter: Hashable, ids: Sequence[int], cache: list[Any]) -> None:
        """Keep the keys and values of `ids`; entries that `ids` begins with are dropped."""
        tokens = np.array(ids, np.int64)
        for key, (other, _) in list(self._entries.items()):
            if key[0] == adapter and common_prefix_length(tokens, other) == len(other):
                self._drop(key)
        size = sum(layer.nbytes for layer in cache)
        if self.match_length(adapter, ids) == len(tokens) or size > self.limit:
            return
        mx.eval([(layer.keys, layer.values) for layer in cache])
        self._entries[adapter, tuple(ids)] = tokens, cache
        self.nbytes += size
        while self.nbytes > self.limit or len(self._entries) > MAX_ENTRIES:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: Key) -> None:
        _, cache = self._entries.pop(key)
        self.nbytes -= sum(layer.nbytes for layer in cache)

    def clear(self) -> None:
        self._entries.clear()
        self.nbytes = 0


def common_prefix_length(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    size = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:size]) != np.asarray(b[:size]))
    return int(different[0]) if len(different) else size


def slice_cache(cache: list[Any], count: int) -> list[Any]:
    """Return the first `count` positions of a cache, as new caches over the same arrays."""
    layers = []
    for layer in cache:
        part = type(layer)()
        part.keys, part.values = layer.keys[..., :count, :], layer.values[..., :count, :]
        part.offset = count
        layers.append(part)
    return layers
