"""Keys and values of texts read before, for texts that begin alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

Key = tuple[Hashable, tuple[int, ...]]
"""What read a text (an adapter), and the text."""


MOST = 256
"""Texts that are kept; each request is compared with all of them."""


class PrefixCache:
    """The texts used last that fit into `limit` bytes.

    What is reused was computed from the same tokens in the same places: it changes no answer but
    by rounding, where it was computed beside other streams.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.nbytes = 0
        self._kept: OrderedDict[Key, tuple[np.ndarray, list[Any]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def common(self, reader: Hashable, ids: Sequence[int]) -> int:
        """How many of the first `ids` are known."""
        return self._best(reader, ids)[0]

    def take(self, reader: Hashable, ids: Sequence[int]) -> list[Any] | None:
        """Keys and values of the first `ids`, of as many as are known; None for none.

        A cache a layer, mlx-lm's, that shares its arrays with what is kept: it must not be written
        to. Its offset says how many it holds.
        """
        count, key = self._best(reader, ids)
        if key is None:
            return None
        self._kept.move_to_end(key)
        return first(self._kept[key][1], count)

    def _best(self, reader: Hashable, ids: Sequence[int]) -> tuple[int, Key | None]:
        wanted, best, found = np.array(ids, np.int64), 0, None
        for key, (known, _) in self._kept.items():
            if key[0] == reader and (count := common(known, wanted)) > best:
                best, found = count, key
        return best, found

    def keep(self, reader: Hashable, ids: Sequence[int], cache: list[Any]) -> None:
        """Remember keys and values of `ids`, in the place of shorter texts that they begin with."""
        known = np.array(ids, np.int64)
        for key, (other, _) in list(self._kept.items()):
            if key[0] == reader and common(known, other) == len(other):
                self._forget(key)
        size = sum(layer.nbytes for layer in cache)
        covered = self._best(reader, ids)[0] == len(known)
        if covered or size > self.limit:
            return
        mx.eval([(layer.keys, layer.values) for layer in cache])
        self._kept[reader, tuple(ids)] = known, cache
        self.nbytes += size
        while self.nbytes > self.limit or len(self._kept) > MOST:
            self._forget(next(iter(self._kept)))

    def _forget(self, key: Key) -> None:
        _, cache = self._kept.pop(key)
        self.nbytes -= sum(layer.nbytes for layer in cache)

    def clear(self) -> None:
        self._kept.clear()
        self.nbytes = 0


def common(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """How many tokens two texts begin with alike."""
    size = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:size]) != np.asarray(b[:size]))
    return int(different[0]) if len(different) else size


def first(cache: list[Any], count: int) -> list[Any]:
    """The first `count` positions of a cache, which is not changed by what is done to them."""
    parts = []
    for layer in cache:
        part = type(layer)()
        part.keys, part.values = layer.keys[..., :count, :], layer.values[..., :count, :]
        part.offset = count
        parts.append(part)
    return parts
