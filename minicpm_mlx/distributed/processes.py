"""Supervises the processes of a launch: starts them, merges their errors, ends them together."""

from __future__ import annotations

import math
import os
import pty
import signal
import subprocess
import sys
import time
import tty
from collections.abc import Mapping, Sequence
from contextlib import suppress

from .stderr import StderrMux

GRACE = 2.0
"""Seconds in which other ranks may fail by themselves after one: of a mistake that all make."""
PATIENCE = 10.0
"""Seconds from asking a rank to end until it is killed; it may save its work."""


def run(commands: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run shell commands, one a rank, until all have ended; returns the worst exit status.

    Input and output are rank 0's; what others write is shown on standard error, under their rank.
    When one fails, the others are ended. SIGINT, SIGTERM and SIGHUP are passed on to all; a second
    one kills. The status of a signal is 128 and its number.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    descriptors: list[int] = []
    caught: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _: caught.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN  # by nohup
    }
    try:
        for command in commands:
            # Rank 0 shows progress if we have a terminal; raw, for ours adds the \r itself.
            reader, writer = pty.openpty() if not ranks and os.isatty(2) else os.pipe()
            if os.isatty(writer):
                tty.setraw(writer)
            descriptors.append(reader)
            rank = subprocess.Popen(
                ["/bin/bash", "-c", command],
                env=environment,
                stdin=subprocess.PIPE if command.startswith("ssh ") else None,
                stdout=writer if ranks else None,
                stderr=writer,
                start_new_session=True,  # Ctrl-C reaches it from us alone
            )
            os.close(writer)
            ranks.append(rank)
        return _supervise(ranks, StderrMux(descriptors), caught)
    finally:
        for rank in ranks:
            _send(rank, signal.SIGKILL)  # also to what an ended rank has started
            rank.communicate()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _send(rank: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a rank and what it has started; over ssh, Ctrl-C travels as a key."""
    with suppress(OSError):  # it has ended
        if rank.stdin and number == signal.SIGINT:
            os.write(rank.stdin.fileno(), b"\x03")
        else:
            os.killpg(rank.pid, number)


def _supervise(
    ranks: Sequence[subprocess.Popen[bytes]], mux: StderrMux, caught: Sequence[int]
) -> int:
    passed_on = 0  # how many signals
    failed_at = kill_at = math.inf
    stopped: list[subprocess.Popen[bytes]] = []  # by us, since another failed
    while running := [rank for rank in ranks if rank.poll() is None]:
        mux.relay(0.05)
        now, number = time.monotonic(), 0
        if passed_on < len(caught):
            number, passed_on = caught[passed_on], passed_on + 1
            kill_at = now if kill_at < math.inf else now + PATIENCE
        elif now >= kill_at:
            number = signal.SIGKILL
        elif kill_at == math.inf and now > failed_at + GRACE:
            number, kill_at, stopped = signal.SIGTERM, now + PATIENCE, running
        if failed_at == math.inf and any(rank.returncode for rank in ranks):
            failed_at = now
        for rank in running if number else ():
            _send(rank, number)
    while mux.relay(0.05):  # not to the end of all: what a rank started may hold its stream open
        pass
    codes = {index: rank.returncode for index, rank in enumerate(ranks) if rank not in stopped}
    if caught and any(codes.values()):
        return 128 + caught[0]
    for index in (index for index, code in codes.items() if code < 0):
        cause = f"rank {index} was ended by {signal.Signals(-codes[index]).name}"
        print(f"minicpm-mlx: {cause}; the launch ended with it", file=sys.stderr)
    return max(code if code >= 0 else 128 - code for code in codes.values())
