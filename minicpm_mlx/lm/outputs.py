"""What a model answers: its pieces as they come, the whole, and what it cost."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ..stops import StopStrings
from ..text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What one reply cost."""

    prompt_tokens: int
    """Tokens of the prompt."""
    cached_tokens: int
    """How many of them were in the cache already."""
    completion_tokens: int
    """Tokens of the reply."""
    ttft: float
    """Seconds to the first token."""
    seconds: float
    """Seconds in all."""
    passes: int
    """Forward passes that made the reply, the prompt's own not counted."""
    peak_memory: int
    """Most bytes MLX held at once since the process began."""

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens read a second, cached ones not counted."""
        return (self.prompt_tokens - self.cached_tokens) / self.ttft if self.ttft else 0.0

    @property
    def decode_tps(self) -> float:
        """Tokens a second after the first; 0 for a reply of one token."""
        later = self.seconds - self.ttft
        return (self.completion_tokens - 1) / later if later > 0 and self.completion_tokens else 0.0


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The next bit of a reply; the last one has a finish_reason and stats."""

    text: str
    """Text that is certain: whole characters, and no part of a stop string."""
    token_ids: tuple[int, ...] = ()
    """Tokens read since the last piece, end of text not counted."""
    finish_reason: str | None = None
    """"stop" (the model ended, or a stop string came) or "length"."""
    stats: Stats | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole reply."""

    text: str
    token_ids: tuple[int, ...]
    """Its tokens, end of text not counted; a stop string cuts the text but not these."""
    finish_reason: str
    """"stop" (the model ended, or a stop string came) or "length"."""
    stats: Stats


class Transcript:
    """Tokens of a reply to its text, up to where it ends."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        *,
        eos: Collection[int] | None = None,
        skip_special: bool = True,
    ):
        self.eos = tokenizer.eos_ids if eos is None else eos
        self.decoder, self.text = tokenizer.stream(skip_special), StopStrings(stops)
        self.count = 0
        """Tokens, end of text not counted."""
        self.ended = False
        """The model has ended, or a stop string has come."""

    def add(self, token: int) -> Piece:
        """What `token` makes certain."""
        if token in self.eos:
            self.ended = True
            return Piece(text="")
        self.count += 1
        text = self.text.add(self.decoder.add(token))
        self.ended = self.text.found is not None
        return Piece(text=text, token_ids=(token,))

    def finish(self, stats: Stats) -> Piece:
        """The last piece: what was held back."""
        rest = "" if self.text.found else self.text.add(self.decoder.finish()) + self.text.finish()
        return Piece(text=rest, finish_reason="stop" if self.ended else "length", stats=stats)


def collect(pieces: Iterable[Piece]) -> Completion:
    """Join the pieces of a stream."""
    texts: list[str] = []
    ids: list[int] = []
    for piece in pieces:
        texts.append(piece.text)
        ids.extend(piece.token_ids)
    assert piece.finish_reason is not None
    assert piece.stats is not None
    return Completion(
        text="".join(texts),
        token_ids=tuple(ids),
        finish_reason=piece.finish_reason,
        stats=piece.stats,
    )
