"""Merges what the ranks of a launch write to standard error."""

from __future__ import annotations

import os
import re
import select
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

NOISE = b"\0" if "MLX_RING_VERBOSE" in os.environ else b"[ring] "
"""Start of lines that MLX logs many times over before its error that a connection is lost."""

HOLD = 1.0
"""Seconds for which a line of another rank waits, in case rank 0 writes the same."""


class StderrMux:
    """Copies rank 0's bytes as they come and other ranks' lines under their number, except lines
    that another rank has just written."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self._ranks = {descriptor: rank for rank, descriptor in enumerate(descriptors)}
        self._unfinished = [b""] * len(descriptors)
        self._held: list[tuple[float, int, bytes]] = []
        self._recent: deque[tuple[int, bytes]] = deque(maxlen=100)

    def relay(self, seconds: float) -> bool:
        """Copy what comes within `seconds`; whether there may be more."""
        ready, _, _ = select.select(list(self._ranks), [], [], seconds)
        for descriptor in ready:
            rank, data = self._ranks[descriptor], b""
            with suppress(OSError):  # the end of a terminal
                data = os.read(descriptor, 65536)
            if not data:
                os.close(descriptor)
                del self._ranks[descriptor]
            self._copy(rank, data)
        while self._held and self._held[0][0] <= time.monotonic():
            _, rank, text = self._held.pop(0)
            if all(t != text or r == rank for r, t in self._recent):
                self._write(rank, text, b"[rank %d] %s\n" % (rank, text))
        return bool(ready or self._held)

    def _copy(self, rank: int, data: bytes) -> None:
        *lines, rest = re.split(rb"(?<=[\r\n])", self._unfinished[rank] + data)
        # A line of rank 0 is shown as it grows, once it cannot become noise.
        if not data or (rank == 0 and not NOISE.startswith(rest[: len(NOISE)])):
            lines, rest = [*lines, rest], b""
        self._unfinished[rank] = rest
        for line in (line for line in lines if not line.startswith(NOISE)):
            if rank == 0:
                self._write(rank, line.rstrip(), line)
            elif text := line.rstrip():
                self._held.append((time.monotonic() + HOLD, rank, text))

    def _write(self, rank: int, text: bytes, data: bytes) -> None:
        self._recent.append((rank, text))
        with suppress(OSError):  # nobody reads our errors any more; the ranks continue
            os.write(2, data)
