"""The processes of one launch: started together, heard apart, ended together.

MLX's own launcher is not called: it exits with 0 whatever its processes did, mixes what they print
and leaves them behind on SIGTERM (MLX 0.32.4).
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import threading
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from .stderr import Voices

GRACE = 0.5
"""Seconds in which others may fail by themselves, of what one has: a mistake all of them see."""
LATE = 3.0
"""Seconds in which the others end that are asked to, once one has."""
PATIENCE = 10.0
"""Seconds from asking a rank to end until it is killed; in them it may save its work."""
LAUNCHED = "MINICPM_MLX_LAUNCHED"
"""Set for every rank: it is to end when what started it has."""


@dataclass(frozen=True)
class Start:
    """How to start one rank."""

    command: Sequence[str]
    """Program and arguments."""
    environment: Mapping[str, str]
    """All of its environment."""
    remote: bool = False
    """Whether the command is ssh's, with a terminal there: Ctrl-C travels as a key, and what the
    rank writes to either stream comes from the first."""


@dataclass(frozen=True)
class Ended:
    """How a launch ended."""

    status: int
    """The worst exit status of a rank that ended by itself; 128 and its number for a signal."""
    killed: tuple[tuple[int, str], ...] = ()
    """Ranks that a signal which was not ours ended, each with the signal's name."""


class Rank:
    """One process of the launch."""

    def __init__(self, number: int, start: Start) -> None:
        self.remote = start.remote
        self.told: signal.Signals | None = None
        """The signal that we ended it with."""
        quiet = number > 0
        self.voice, stderr = pty.openpty() if not quiet and os.isatty(2) else os.pipe()
        if os.isatty(stderr):
            tty.setraw(stderr)  # else it would write \r\n for \n, as the real terminal does again
        stdin = subprocess.PIPE if start.remote else subprocess.DEVNULL if quiet else None
        stdout = None if not quiet else stderr if start.remote else subprocess.DEVNULL
        try:
            # In a session of its own: Ctrl-C reaches it from us alone, and once.
            self.process = subprocess.Popen(
                list(start.command),
                env=dict(start.environment),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        except BaseException:
            os.close(self.voice)
            raise
        finally:
            os.close(stderr)

    @property
    def status(self) -> int | None:
        """Its exit status, 128 and the number for a signal; None while it runs."""
        running = self.process.returncode is None
        found = self.process.poll()
        if running and found is not None:
            self._to_group(signal.SIGKILL)  # now, while no other process can have its number
        return found if found is None or found >= 0 else 128 - found

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it and whatever it has started."""
        if self.status is not None:
            return
        if self.remote and number == signal.SIGINT and self.process.stdin:
            with suppress(OSError):
                self.process.stdin.write(b"\x03")
                self.process.stdin.flush()
            return
        self._to_group(number)

    def close(self) -> None:
        """Leave nothing of it behind."""
        if self.status is None:
            self._to_group(signal.SIGKILL)
            self.process.wait()
        if self.process.stdin:
            with suppress(OSError):
                self.process.stdin.close()

    def _to_group(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):  # the latter of macOS, for a zombie
            os.killpg(self.process.pid, number)


def run(starts: Sequence[Start]) -> Ended:
    """Run processes until all have ended; the first is rank 0, whose output is this process's.

    Of the others standard output is dropped and errors are shown with the rank. When one fails the
    others are ended, and SIGINT, SIGTERM and SIGHUP reach all of them; a second one kills. OSError
    where a program cannot be started.
    """
    ranks: list[Rank] = []
    with _signals() as caught:
        try:
            for number, start in enumerate(starts):
                ranks.append(Rank(number, start))
        except BaseException:
            for each in ranks:
                os.close(each.voice)
                each.close()
            raise
        try:
            return _watched(ranks, caught)
        finally:
            for each in ranks:
                each.close()


def end_with_the_launcher() -> None:
    """In a rank: see to it that this process ends when the one that started it has, even killed."""
    if LAUNCHED not in os.environ:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _watched(ranks: list[Rank], caught: list[signal.Signals]) -> Ended:
    voices = Voices([rank.voice for rank in ranks])
    asked: signal.Signals | None = None  # by which signal we were to end
    failed: float | None = None  # when we first saw that one had
    kill = float("inf")
    while any(rank.status is None for rank in ranks):
        voices.relay(0.05)
        now = time.monotonic()
        if caught:
            number = caught.pop(0)
            kill = now if kill < float("inf") else now + PATIENCE
            for rank in ranks:
                rank.send(number)
            asked, failed = asked or number, float("inf")  # to end now is no failure
            voices.asked_to_end = True
        if asked and any(rank.status is not None for rank in ranks):
            kill = min(kill, now + LATE)  # the others may wait for the one that has ended
        if failed is None and any(rank.status for rank in ranks):
            failed = now
        if failed is not None and now > failed + GRACE:
            _end(ranks, signal.SIGTERM)
            failed, kill = float("inf"), now + PATIENCE
        if now >= kill:
            _end(ranks, signal.SIGKILL)
            kill = now + PATIENCE
    voices.finish()
    return _judged(ranks, asked)


def _end(ranks: list[Rank], number: signal.Signals) -> None:
    for rank in ranks:
        if rank.status is None:
            rank.send(number)
            rank.told = number


def _judged(ranks: list[Rank], asked: signal.Signals | None) -> Ended:
    own = {index: rank for index, rank in enumerate(ranks) if rank.told is None}
    worst = max((rank.status or 0 for rank in own.values()), default=128 + (asked or 0))
    signals = {index: -rank.process.returncode for index, rank in own.items()}
    if asked is not None:  # what they said of each other's end does not matter
        return Ended(128 + asked if worst else 0)
    return Ended(worst, tuple((i, signal.Signals(s).name) for i, s in signals.items() if s > 0))


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Signals that ask us to end, as they come; outside the main thread Python sees none."""
    caught: list[signal.Signals] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
                before[number] = signal.signal(
                    number, lambda found, _: caught.append(signal.Signals(found))
                )
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
