"""Replies: streamed pieces, the complete text, stop strings, and statistics."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..arguments import listed
from ..text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Statistics of one reply."""

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

    @classmethod
    def measure(
        cls,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        completion_tokens: int,
        start: float,
        first: float,
        passes: int | None = None,
    ) -> Stats:
        """Stats of a reply that ends now, with `start` and first token at time.perf_counter().

        `first` is 0 where no token came. Without `passes`, each token but the first took one.
        """
        now = time.perf_counter()
        return cls(
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            completion_tokens=completion_tokens,
            ttft=(first or now) - start,
            seconds=now - start,
            passes=max(completion_tokens - 1, 0) if passes is None else passes,
            peak_memory=mx.get_peak_memory(),
        )

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
    """Decodes the tokens of a reply up to its end.

    A stop string may name special tokens, which the text leaves out: it is found where they come.
    With `continues` the reply begins in the prompt, so that a space may come first.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        *,
        eos: Collection[int] | None = None,
        skip_special: bool = True,
        continues: bool = False,
    ):
        self.eos = tokenizer.eos_ids if eos is None else eos
        special = tokenizer.special_tokens if stops else {}
        self.stop_tokens = {special[stop]: stop for stop in stops if stop in special}
        """They end the reply as the model's own do: the ids and their stop strings."""
        self.decoder = tokenizer.stream(skip_special, continues)
        self.marks = _marks(stops, special) if skip_special else {}
        """Characters for the special tokens inside longer stop strings, by name."""
        self.mark_of = {special[name]: mark for name, mark in self.marks.items()}
        self.text = StopStrings(stops, self.marks)
        self.count = 0
        """Tokens, end of text not counted."""
        self.ended = False
        """The model has ended, or a stop string has come."""
        self.stopped_by: str | None = None
        """The stop string that came."""

    def add(self, token: int) -> Piece:
        """The text that is final after `token`."""
        self.stopped_by = self.stop_tokens.get(token)
        if self.stopped_by or token in self.eos:
            self.ended = True
            return Piece(text="")
        self.count += 1
        text = self.text.add(self.decoder.add(token) + self.mark_of.get(token, ""))
        self.stopped_by = self.text.found
        self.ended = self.text.found is not None
        return Piece(text=text, token_ids=(token,))

    def finish(self, stats: Stats) -> Piece:
        """The last piece: what was held back, without the bytes of an incomplete character."""
        rest = "" if self.text.found else self.text.finish()
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


def stop_list(stop: object) -> list[str]:
    """Stop strings as a list: None is none of them, a lone string one."""
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    expected = "a string or a list of strings, none of them empty"
    return listed("stop", stops, expected, lambda item: isinstance(item, str) and item != "")


class StopStrings:
    """Passes text until a stop string comes; holds back a possible start of one.

    `marks` are characters that stand for special tokens in what is added, by name: stop strings
    contain the names, and the text that is passed has neither.
    """

    def __init__(self, stops: Sequence[str], marks: Mapping[str, str] | None = None):
        self.stops = {stop: stop for stop in stops}
        """By the text to look for."""
        marks = marks or {}
        names = "|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or "(?!)"
        for stop in stops:
            marked = re.sub(names, lambda name: marks[name[0]], stop)
            self.stops.setdefault(marked, stop)
        self.unmarked = {ord(mark): None for mark in marks.values()}
        self.held = ""
        self.found: str | None = None
        """The stop string that came."""

    def add(self, text: str) -> str:
        """The new text that cannot be part of a stop string."""
        self.held += text
        hits = [
            (at + len(stop), at, stop) for stop in self.stops if (at := self.held.find(stop)) >= 0
        ]
        if hits:
            # The one complete first, as if the text had come letter by letter.
            _, at, stop = min(hits)
            self.found = self.stops[stop]
            certain, self.held = self.held[:at], ""
            return certain.translate(self.unmarked)
        keep = max((overlap(self.held, stop) for stop in self.stops), default=0)
        at = len(self.held) - keep
        certain, self.held = self.held[:at], self.held[at:]
        return certain.translate(self.unmarked)

    def finish(self) -> str:
        """The text held back, at the end of the reply."""
        held, self.held = self.held, ""
        return held.translate(self.unmarked)


def _marks(stops: Sequence[str], special: Iterable[str]) -> dict[str, str]:
    """A character for each special token that a longer stop string contains.

    They are halves of surrogate pairs, which no decoded text has.
    """
    names = [name for name in special if any(name in stop and name != stop for stop in stops)]
    return {name: chr(0xD800 + number) for number, name in enumerate(names)}


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if stop.startswith(text[-size:])), 0)
