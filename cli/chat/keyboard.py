"""The keyboard while the program works: nothing typed shows up in the output, and none is lost."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PASTES = "\x1b[?2004{}"  # h: the terminal marks what is pasted; l: it does not
"""The prompt turns this on for itself alone. Kept on, a paste made meanwhile stays one message."""


@contextmanager
def quiet() -> Iterator[None]:
    """Keys typed while no prompt is open are not echoed; the next prompt shows them."""
    import termios  # not on Windows, where nothing here runs

    if not sys.stdin.isatty():
        yield
        return
    shown = termios.tcgetattr(sys.stdin)
    hidden = termios.tcgetattr(sys.stdin)
    hidden[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, hidden)
    try:
        yield
    finally:
        with suppress(termios.error, OSError):  # the terminal has gone
            mark_pastes(False)
            termios.tcsetattr(sys.stdin, termios.TCSANOW, shown)


def mark_pastes(on: bool) -> None:
    if sys.stdin.isatty():
        sys.stdout.write(PASTES.format("h" if on else "l"))
        sys.stdout.flush()


@contextmanager
def one_interrupt() -> Iterator[None]:
    """Only the first Ctrl-C counts: what it breaks off is then being brought to its end."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
