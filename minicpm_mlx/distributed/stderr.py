"""Merges what the ranks of a launch write to standard error."""

from __future__ import annotations

import os
import re
import select
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

NOISE = b"\0" if "MLX_RING_VERBOSE" in os.environ else b"[ring] "
"""Start of lines that MLX logs many times over before its error that a connection is lost."""


class StderrMux:
    """Copies rank 0's bytes as they come and other ranks' lines under their number, except lines
    that another rank has just written."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self._ranks = {descriptor: rank for rank, descriptor in enumerate(descriptors)}
        self._unfinished = [b""] * len(descriptors)
        self._recent: deque[tuple[int, bytes]] = deque(maxlen=100)

    def relay(self, seconds: float) -> bool:
        """Copy what comes within `seconds`; whether anything came."""
        ready, _, _ = select.select(list(self._ranks), [], [], seconds)
        for descriptor in ready:
            rank, data = self._ranks[descriptor], b""
            with suppress(OSError):  # the end of a terminal
                data = os.read(descriptor, 65536)
            if not data:
                os.close(descriptor)
                del self._ranks[descriptor]
            self._copy(rank, data)
        return bool(ready)

    def _copy(self, rank: int, data: bytes) -> None:
        *lines, rest = re.split(rb"(?<=[\r\n])", self._unfinished[rank] + data)
        # A line of rank 0 is shown as it grows, once it cannot become noise.
        if not data or (rank == 0 and not NOISE.startswith(rest[: len(NOISE)])):
            lines, rest = [*lines, rest], b""
        self._unfinished[rank] = rest
        for line in lines:
            text = line.rstrip()
            repeated = text and any(t == text and r != rank for r, t in self._recent)
            if not line.startswith(NOISE) and not repeated:
                self._recent.append((rank, text))
                with suppress(OSError):  # nobody reads our errors any more; the ranks continue
                    os.write(2, b"[rank %d] %s\n" % (rank, text) if rank and text else line)
