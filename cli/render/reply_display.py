"""Shows a reply as it comes: the thought, one line in its place, and the answer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from .texts import CONTROLS

if TYPE_CHECKING:
    from minicpm_mlx import Piece


class TextWriter(Protocol):
    """Writes a text that arrives in pieces."""

    def feed(self, text: str) -> None: ...

    def close(self) -> None: ...


class PlainStream:
    """Writes a reply as it comes; `safe` removes control characters."""

    def __init__(self, *, safe: bool) -> None:
        self.safe = safe
        self.started = False

    def feed(self, text: str) -> None:
        self.started = True
        if self.safe:
            text = CONTROLS.sub("", text)
        sys.stdout.write(text)
        sys.stdout.flush()

    def close(self) -> None:
        if self.started:
            print(flush=True)


class ReplyDisplay:
    """Shows the pieces of one reply.

    `answer` and `thought` make a stream for each part of it; without `thought` only the answer is
    shown. `thought_ended` is told the seconds and tokens of a thought, in place of which it prints.
    """

    def __init__(
        self,
        answer: Callable[[], TextWriter],
        thought: Callable[[], TextWriter] | None,
        thought_ended: Callable[[float, int], object],
    ) -> None:
        self._open_answer, self._open_thought = answer, thought
        self._thought_ended = thought_ended
        self._answer = answer()  # which shows how long the first word takes
        self._thought: TextWriter | None = None
        self._began, self._tokens = 0.0, 0

    def feed(self, piece: Piece) -> None:
        if piece.kind == "thinking":
            self._began = self._began or time.monotonic()
            self._tokens += len(piece.token_ids)
        if piece.thinking and self._open_thought is not None:
            if self._thought is None:
                self._answer.close()
                self._thought = self._open_thought()
            self._thought.feed(piece.thinking)
        if piece.kind == "answer":
            self._end_thought()
        if piece.text:
            self._answer.feed(piece.text)

    def close(self) -> None:
        self._end_thought()
        self._answer.close()

    def _end_thought(self) -> None:
        thought, self._thought = self._thought, None
        seconds, tokens = time.monotonic() - self._began, self._tokens
        self._began, self._tokens = 0.0, 0
        if thought is not None:
            thought.close()
            self._thought_ended(seconds, tokens)
            self._answer = self._open_answer()
