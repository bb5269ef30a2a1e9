"""A sign of life where nothing else moves: while a prompt is read, or a table held back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Event, Lock, Thread
from time import monotonic

from .theme import console

QUIET = 0.7  # seconds in which nothing was written before the sign appears
STEP = 0.25  # seconds between looks
ROOM = 16  # columns: the sign never wraps


class Waiting:
    """A stream of Markdown with a count of seconds on the empty line it will go on at.

    A thread writes it, since the model gives no word meanwhile; the lock is held from before the
    stream decides to write until it has written, so that the two never mix.
    """

    def __init__(self, sign: Callable[[int], str]) -> None:
        from .markdown import MarkdownStream

        self._console, self._sign = console(), sign
        self._stream = MarkdownStream(self._console, before=self._make_way)
        self._lock, self._ended = Lock(), Event()
        self._shown = False
        self._since = monotonic()  # when something was last written
        Thread(target=self._run, daemon=True).start()

    def feed(self, text: str) -> None:
        with self._lock:
            self._stream.feed(text)

    def close(self) -> None:
        """Writes what is kept back. The thread is not waited for: it may sleep."""
        self._ended.set()
        with self._lock:
            self._make_way()
            self._stream.close()

    def _run(self) -> None:
        while not self._ended.wait(STEP):
            with self._lock, suppress(OSError, ValueError):  # the terminal has gone
                self._look()

    def _look(self) -> None:
        seconds = monotonic() - self._since
        idle = self._stream.at_line_start and seconds > QUIET and not self._ended.is_set()
        if idle and self._console.is_terminal and self._console.width >= ROOM:
            self._write(f"\r\x1b[2m{self._sign(int(seconds))}\x1b[0m\x1b[K")
            self._shown = True

    def _make_way(self) -> None:
        if self._shown:
            self._write("\r\x1b[K")
        self._shown, self._since = False, monotonic()

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()
