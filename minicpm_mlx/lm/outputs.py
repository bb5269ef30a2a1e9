"""Replies: streamed pieces, the complete text, stop strings, and statistics."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from ..arguments import listed
from ..text.thinking import Phase, ThinkingForm, ThoughtReader, overlap
from ..text.tokenizer import Tokenizer
from .tools.calls import CallReader, ToolCall


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Statistics of one reply."""

    prompt_tokens: int
    """Tokens of the prompt."""
    cached_tokens: int
    """How many of them were in the cache already."""
    completion_tokens: int
    """Tokens of the reply."""
    thinking_tokens: int = 0
    """How many of them were the thought, with its marks."""
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
        thinking_tokens: int = 0,
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
            thinking_tokens=thinking_tokens,
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
    """Text of the answer that is certain: whole characters, and no part of a stop string."""
    thinking: str = ""
    """Text of the thought before it."""
    kind: str = "answer"
    """What its tokens belong to: "thinking", marks among it, or "answer"."""
    token_ids: tuple[int, ...] = ()
    """Tokens read since the last piece, end of text not counted."""
    finish_reason: str | None = None
    """"stop" (the model ended, or a stop string came) or "length"."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls that are complete with it, where `tools` were given; they are no part of its text."""
    in_thought: bool = False
    """In the last piece: the reply ended before its answer began."""
    stopped_by: str | None = None
    """In the last piece: the stop string that came."""
    stats: Stats | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A whole reply."""

    text: str
    """The answer."""
    thinking: str = ""
    """The thought before it."""
    tool_calls: tuple[ToolCall, ...] = ()
    """The functions that the model calls; they are no part of the text."""
    token_ids: tuple[int, ...]
    """Its tokens, end of text not counted; a stop string cuts the text but not these."""
    finish_reason: str
    """"stop" (the model ended, or a stop string came) or "length"."""
    in_thought: bool = False
    """The reply ended before its answer began."""
    stats: Stats

    def message(self) -> dict[str, Any]:
        """The reply as a message of the conversation."""
        return reply_message(self.text, self.thinking, self.tool_calls)


def reply_message(
    text: str, thinking: str = "", tool_calls: Sequence[ToolCall] = ()
) -> dict[str, Any]:
    """A reply as a message; chat templates take its thought and its calls, if any, apart."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thinking:
        message["reasoning_content"] = thinking
    if tool_calls:
        message["tool_calls"] = [call.message() for call in tool_calls]
    return message


class Transcript:
    """Decodes the tokens of a reply up to its end.

    A stop string may name special tokens, which the text leaves out: it is found where they come.
    With `continues` the reply begins in the prompt, so that a space may come first. `token_marks`
    are put in front of the text of tokens, in the answer alone. With `thinking` thoughts are told
    from the answer, in which alone stop strings are looked for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        *,
        eos: Collection[int] | None = None,
        skip_special: bool = True,
        continues: bool = False,
        token_marks: Mapping[int, str] | None = None,
        thinking: ThinkingForm | None = None,
        in_thought: bool = False,
    ):
        self.eos = tokenizer.eos_ids if eos is None else eos
        special = tokenizer.special_tokens if stops else {}
        self.stop_tokens = {special[stop]: stop for stop in stops if stop in special}
        """They end the reply as the model's own do: the ids and their stop strings."""
        token_marks = token_marks or {}
        self.decoder = tokenizer.stream(skip_special, continues, token_marks)
        self.unmarked = {ord(mark): None for mark in token_marks.values()}
        self.marks = _marks(stops, special) if skip_special else {}
        """Characters for the special tokens inside longer stop strings, by name."""
        self.mark_of = {special[name]: mark for name, mark in self.marks.items()}
        names = {tokenizer.bytes_of(token).decode(): mark for token, mark in token_marks.items()}
        self.text = StopStrings(stops, self.marks, names)
        self.thoughts = ThoughtReader(thinking, is_open=in_thought) if thinking else None
        self.thinking_count = 0
        """Tokens of thoughts, with their marks."""
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
        was_thinking = self.in_thought
        thinking, text = self._read(token)
        text = self.text.add(text)
        self.stopped_by = self.text.found
        self.ended = self.text.found is not None
        kind = "thinking" if was_thinking or self.in_thought else "answer"
        self.thinking_count += kind == "thinking"
        thinking = thinking.translate(self.unmarked)
        return Piece(text=text, thinking=thinking, kind=kind, token_ids=(token,))

    def _read(self, token: int) -> tuple[str, str]:
        """What a token adds to the thought and to the answer."""
        reader = self.thoughts
        if reader is None:
            return "", self.decoder.add(token) + self.mark_of.get(token, "")
        if not reader.is_mark(token):
            return self._add(self.decoder.add(token) + self.mark_of.get(token, ""))
        thinking, text = self._add(self.decoder.finish())
        return thinking, text + reader.mark(token)

    def _add(self, text: str) -> tuple[str, str]:
        return self.thoughts.add(text) if self.thoughts and text else ("", text)

    @property
    def in_thought(self) -> bool:
        """Whether the thought has begun and not ended."""
        return self.thoughts is not None and self.thoughts.phase is Phase.THINKING

    def finish(self, stats: Stats) -> Piece:
        """The last piece: what was held back, without the bytes of an incomplete character."""
        in_thought = self.in_thought
        thinking, text = self.thoughts.finish() if self.thoughts else ("", "")
        rest = "" if self.text.found else self.text.add(text) + self.text.finish()
        return Piece(
            text=rest,
            thinking=thinking.translate(self.unmarked),
            finish_reason="stop" if self.ended else "length",
            in_thought=in_thought,
            stopped_by=self.stopped_by,
            stats=stats,
        )


def with_calls(
    pieces: Generator[Piece, None, None], reader: CallReader
) -> Generator[Piece, None, None]:
    """The pieces of a stream, in which calls are told from text."""
    with closing(pieces):
        for piece in pieces:
            parts = reader.read(piece)
            text = "".join(part for part in parts if isinstance(part, str))
            calls = tuple(part for part in parts if isinstance(part, ToolCall))
            yield replace(piece, text=text, tool_calls=calls)


def collect(pieces: Iterable[Piece]) -> Completion:
    """Join the pieces of a stream."""
    texts: list[str] = []
    thoughts: list[str] = []
    ids: list[int] = []
    calls: list[ToolCall] = []
    for piece in pieces:
        texts.append(piece.text)
        thoughts.append(piece.thinking)
        ids.extend(piece.token_ids)
        calls.extend(piece.tool_calls)
    assert piece.finish_reason is not None
    assert piece.stats is not None
    return Completion(
        text="".join(texts),
        thinking="".join(thoughts),
        tool_calls=tuple(calls),
        token_ids=tuple(ids),
        finish_reason=piece.finish_reason,
        in_thought=piece.in_thought,
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
    contain the names, and the text that is passed has neither. `before` are characters in front of
    names, which are passed.
    """

    def __init__(
        self,
        stops: Sequence[str],
        marks: Mapping[str, str] | None = None,
        before: Mapping[str, str] | None = None,
    ):
        self.stops = {stop: stop for stop in stops}
        """By the text to look for."""
        marks = marks or {}
        names = "|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or "(?!)"
        for stop in stops:
            marked = re.sub(names, lambda name: marks[name[0]], stop)
            self.stops.setdefault(marked, stop)
            for name, mark in (before or {}).items():
                self.stops.setdefault(stop.replace(name, mark + name), stop)
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
