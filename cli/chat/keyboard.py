"""The keyboard while the program works: hides typed keys and keeps them for the next prompt."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PASTES = "\x1b[?2004{}"  # h: the terminal marks what is pasted; l: it does not
"""prompt_toolkit turns it on for its prompts only. Left on, a paste in between is one message."""


@contextmanager
def quiet() -> Iterator[None]:
    """Turns off echo between prompts; the next prompt gets and shows the keys typed meanwhile.

    Without NOFLSH a Ctrl-C would drop them. Without ICANON the prompt gets Ctrl-D and arrow keys
    too, which else mean something to the terminal alone.
    """
    import termios  # not on Windows, where nothing here runs

    if not sys.stdin.isatty():
        yield
        return
    echoing = termios.tcgetattr(sys.stdin)
    silent = termios.tcgetattr(sys.stdin)
    silent[3] = silent[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH
    termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
    try:
        yield
    finally:
        with suppress(termios.error, OSError):  # the terminal has gone
            mark_pastes(False)
            termios.tcsetattr(sys.stdin, termios.TCSANOW, echoing)


def mark_pastes(on: bool) -> None:
    if sys.stdin.isatty():
        sys.stdout.write(PASTES.format("h" if on else "l"))
        sys.stdout.flush()


@contextmanager
def one_interrupt() -> Iterator[None]:
    """Ignores all but the first Ctrl-C, as the interrupted reply is being saved."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
