"""A conversation: its messages, and the cache that keeps each turn from being read again."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

from .engine import Sampling, Session
from .lm import LM, Piece


@dataclass
class Chat:
    """Turns of one conversation with a model.

    chat = Chat(lm, system="Answer in one sentence.")
    for piece in chat.reply("What is MLX?"):
        print(piece.text, end="")
    """

    lm: LM
    system: str | None = None
    """What the model is told before the first turn."""
    sampling: Sampling | None = None
    """None: the model's own."""
    max_tokens: int | None = None
    """Longest reply; None: as far as the context goes."""
    stop: Sequence[str] = ()
    """Strings that end a reply."""
    messages: list[dict[str, str]] = field(default_factory=list)
    """The turns so far, without the system text."""
    session: Session = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.session = self.lm.session()

    def reply(self, text: str) -> Generator[Piece, None, None]:
        """Answer `text`, a piece at a time.

        A reply that is broken off (Ctrl-C, or the iterator closed) stays in the conversation as far
        as it came; a turn that failed, or was broken off before its first word, leaves no trace.
        """
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        try:
            pieces = self.lm.stream(
                self._prompt(),
                max_tokens=self.max_tokens,
                sampling=self.sampling,
                stop=self.stop,
                session=self.session,
            )
            with closing(pieces):
                for piece in pieces:
                    said.append(piece.text)
                    yield piece
        finally:
            if any(said):
                self.messages.append({"role": "assistant", "content": "".join(said)})
            else:
                self.messages.pop()

    def clear(self) -> None:
        """Forget the turns; the system text stays."""
        self.messages.clear()

    def _prompt(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.messages
