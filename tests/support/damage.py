"""Files damaged at random, for readers that must refuse them or read them right."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st

BYTES = st.integers(0, 255)


def damaged(
    content: bytes, values: st.SearchStrategy[int] = BYTES, *, examples: int
) -> Callable[[Callable[[bytes], None]], Callable[[], None]]:
    """Calls a function with `content`, changed in up to four bytes and perhaps cut off."""
    places = st.integers(0, len(content) - 1)

    def decorate(check: Callable[[bytes], None]) -> Callable[[], None]:
        @settings(max_examples=examples, deadline=None, database=None)
        @given(changes=st.dictionaries(places, values, max_size=4), length=places | st.none())
        def run(changes: dict[int, int], length: int | None) -> None:
            found = bytearray(content)
            for place, byte in changes.items():
                found[place] = byte
            check(bytes(found[:length]))

        return cast("Callable[[], None]", run)

    return decorate


@contextmanager
def memory_grows_by_less_than(size: int) -> Iterator[None]:
    """Asserts that this process's largest size grows by less than `size` bytes meanwhile."""
    before = _largest()
    yield
    assert _largest() - before < size


def _largest() -> int:
    unit = 1024 if sys.platform == "linux" else 1  # what getrusage counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
