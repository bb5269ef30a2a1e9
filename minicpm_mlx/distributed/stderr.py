"""What the ranks of a launch write to their standard error, made into one stream."""

from __future__ import annotations

import os
import re
import select
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

NOISE = b"[ring] "
"""MLX says this many times over on the way to an error that says it once."""
HOLD = 0.5
"""Seconds that another rank's line waits, lest rank 0 says the same."""
RECENT = 100


class Voices:
    """Reads a descriptor a rank, and writes to standard error: rank 0's bytes as they come, the
    others' lines under their rank, and none that another has just said."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self._open = {descriptor: rank for rank, descriptor in enumerate(descriptors)}
        self._parts = [b""] * len(descriptors)
        """What each has begun of a line."""
        self._shown = 0
        """How much of rank 0's is shown already."""
        self._held: list[tuple[float, int, bytes]] = []
        """Others' lines: until when, whose, which."""
        self._said: deque[tuple[int, bytes]] = deque(maxlen=RECENT)
        self.asked_to_end = False
        """From then on what the others say is of no interest: each says that it ends."""
        self._noise = () if "MLX_RING_VERBOSE" in os.environ else (NOISE,)

    def relay(self, seconds: float) -> bool:
        """Pass on what comes within `seconds`; whether anything came."""
        ready, _, _ = select.select(list(self._open), [], [], seconds)
        for descriptor in ready:
            self._hear(descriptor)
        now = time.monotonic()
        while self._held and self._held[0][0] <= now:
            self._release()
        return bool(ready)

    def finish(self) -> None:
        """Pass on all that is left, and close."""
        # Not until the end of the streams: something a rank started may live on and hold them.
        while self._open and self.relay(0):
            pass
        for rank, part in enumerate(self._parts):
            self._line(rank, part + b"\n" if rank else part)
        while self._held:
            self._release()
        for descriptor in self._open:
            os.close(descriptor)
        self._open.clear()

    def _hear(self, descriptor: int) -> None:
        rank = self._open[descriptor]
        data = b""
        with suppress(OSError):  # how a terminal ends
            data = os.read(descriptor, 65536)
        if not data:
            os.close(descriptor)
            del self._open[descriptor]
            return
        *lines, part = re.split(rb"(?<=[\r\n])", self._parts[rank] + data)
        for line in lines:
            self._line(rank, line)
        self._parts[rank] = part
        # Of rank 0 a line is shown as it grows, once it is more than the beginning of noise.
        if rank == 0 and not any(noise.startswith(part[: len(noise)]) for noise in self._noise):
            _write(part[self._shown :])
            self._shown = len(part)

    def _line(self, rank: int, line: bytes) -> None:
        words = line.rstrip()
        if rank == 0:
            if self._shown or not words.startswith(self._noise):
                _write(line[self._shown :])
                self._said.append((0, words))
            self._shown = 0
        elif words and not words.startswith(self._noise):
            self._held.append((time.monotonic() + HOLD, rank, words))

    def _release(self) -> None:
        _, rank, words = self._held.pop(0)
        if self.asked_to_end:
            return
        if not any(said == words and who != rank for who, said in self._said):
            self._said.append((rank, words))
            _write(b"[rank %d] %s\n" % (rank, words))


def _write(data: bytes) -> None:
    with suppress(OSError):  # nobody reads our errors any more; the work goes on
        while data:
            data = data[os.write(2, data) :]
