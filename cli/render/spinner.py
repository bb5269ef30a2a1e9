"""A count of seconds while a reply shows nothing new: during prefill, or inside a table."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import Event, Lock, Thread
from time import monotonic

from .theme import console

QUIET = 0.7  # seconds without output before the count appears
STEP = 0.25  # seconds between updates
ROOM = 16  # least columns, so that the count never wraps


class SpinnerStream:
    """A Markdown stream that counts seconds on its last, empty line while nothing comes.

    A thread writes the count, as the caller waits for the model. The lock covers each write of the
    stream, so that the two never mix.
    """

    def __init__(self, text: Callable[[int], str]) -> None:
        from .markdown import MarkdownStream

        self._console, self._text = console(), text
        self._stream = MarkdownStream(self._console, before=self._erase)
        self._lock, self._ended = Lock(), Event()
        self._shown = False
        self._since = monotonic()  # when something was last written
        Thread(target=self._run, daemon=True).start()

    def feed(self, text: str) -> None:
        with self._lock:
            self._stream.feed(text)

    def close(self) -> None:
        """Writes what is held back. It does not wait for the thread, which may sleep."""
        self._ended.set()
        with self._lock:
            self._erase()
            self._stream.close()

    def _run(self) -> None:
        while not self._ended.wait(STEP):
            with self._lock, suppress(OSError, ValueError):  # the terminal has gone
                self._update()

    def _update(self) -> None:
        seconds = monotonic() - self._since
        idle = self._stream.at_line_start and seconds > QUIET and not self._ended.is_set()
        if idle and self._console.is_terminal and self._console.width >= ROOM:
            self._write(f"\r\x1b[2m{self._text(int(seconds))}\x1b[0m\x1b[K")
            self._shown = True

    def _erase(self) -> None:
        if self._shown:
            self._write("\r\x1b[K")
        self._shown, self._since = False, monotonic()

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()
