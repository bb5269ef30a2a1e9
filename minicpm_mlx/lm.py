"""A loaded model with its tokenizer: text in, text out."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import device as devices
from .adapt import adapt
from .arguments import at_least_one, expect, is_whole, listed, shown, whole
from .config import Config
from .engine import Sampling, Session, generate
from .errors import (
    ConfigError,
    ContextLengthError,
    InvalidArgumentError,
    TokenizerError,
    WeightsError,
)
from .fuse import FusedModel
from .local import folder_of
from .model import Model
from .registry import Card, resolve
from .stops import StopStrings, stop_list
from .template import BUILTIN, Template
from .tokenizer import Tokenizer, load_tokenizer
from .weights import load_model
from .weights.adapters import read_adapter

Message = Mapping[str, str]
"""{"role": "user", "content": "..."}"""

Prompt = str | Sequence[int] | Sequence[Message]
"""Text to continue, token ids to continue, or a conversation to answer."""


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


@dataclass
class LM:
    """A model and its tokenizer; made by `load`."""

    model: Model | FusedModel
    tokenizer: Tokenizer
    card: Card
    sampling: Sampling
    """Used where a call gives none: the card's, or the folder's generation_config.json."""
    folder: Path | None = None
    """Where it was loaded from."""
    adapter: Path | None = None
    """The folder of the adapter on it; see `use_adapter`."""
    room: int | None = None
    """Tokens of context that memory has room for, where that is fewer than the model's."""
    _session: Session | None = field(default=None, repr=False)
    """That of the last `chat`."""

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its reply may have together."""
        limits = self.config.context_length, self.card.context, self.room
        return min(limit for limit in limits if limit)

    def use_adapter(self, folder: str | Path | None) -> None:
        """Put the LoRA or DoRA adapter in `folder` (mlx-lm's layout or PEFT's) on the model in the
        place of the one it has; None takes that off. The weights stay as they are.

        Not while a reply is coming. Raises ConfigError or WeightsError, and changes nothing then.
        """
        path = None if folder is None else Path(folder).expanduser().resolve()
        adapt(self.model, None if path is None else read_adapter(path))
        self.adapter = path

    def session(self, kv_bits: int | None = None) -> Session:
        """A new key-value cache, to be given to every call of one conversation.

        `kv_bits` (8 or 4) keeps it in that many bits (see `Session`).
        """
        return Session(self.config, kv_bits)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: messages go through the template, text and ids do not."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        expected = "text, a list of token ids or a list of messages"
        items = listed("a prompt", prompt, expected, lambda i: is_message(i) or is_whole(i))
        if any(map(is_message, items)):
            return self.tokenizer.chat_ids(items)
        return [whole("a token id", item) for item in items]

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = 512,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        session: Session | None = None,
    ) -> Generator[Piece, None, None]:
        """Continue text or ids, or answer messages, a piece at a time.

        `max_tokens` None: as far as the context goes. Any of the strings in `stop` ends the text
        before it. `session` keeps the cache from one call to the next.

            for piece in lm.stream("Once upon a time"):
                print(piece.text, end="")
        """
        ids = self.encode(prompt)
        room = self.context_length - len(ids)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens and the context is {self.context_length}; "
                "shorten it to leave room for a reply"
            )
        limit = room if max_tokens is None else at_least_one("max_tokens", max_tokens)
        session = self.session() if session is None else session
        stops = stop_list(stop)
        tokens = generate(
            self.model,
            ids,
            max_tokens=min(limit, room),
            sampling=self.sampling if sampling is None else sampling,
            eos=self.tokenizer.eos_ids,
            session=session,
            vocab_size=self.tokenizer.vocab_size,
        )
        is_chat = not isinstance(prompt, str) and any(map(is_message, prompt))
        if is_chat and self.tokenizer.template:
            stops.extend(self.tokenizer.template.stop_strings)
        return self._pieces(tokens, ids, stops, session.common(ids))

    def _pieces(
        self,
        tokens: Generator[int, None, None],
        prompt: list[int],
        stops: Sequence[str],
        cached: int,
    ) -> Generator[Piece, None, None]:
        start = time.perf_counter()
        first: float | None = None
        decoder, text = self.tokenizer.stream(), StopStrings(stops)
        count, reason = 0, "length"
        with closing(tokens):
            for token in tokens:
                first = first or time.perf_counter()
                if token in self.tokenizer.eos_ids:
                    reason = "stop"
                    break
                count += 1
                yield Piece(text=text.add(decoder.add(token)), token_ids=(token,))
                if text.found:
                    reason = "stop"
                    break
        now = time.perf_counter()
        stats = Stats(
            prompt_tokens=len(prompt),
            cached_tokens=cached,
            completion_tokens=count,
            ttft=(first or now) - start,
            seconds=now - start,
            peak_memory=mx.get_peak_memory(),
        )
        rest = "" if text.found else text.add(decoder.finish()) + text.finish()
        yield Piece(text=rest, finish_reason=reason, stats=stats)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = 512,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        session: Session | None = None,
    ) -> Completion:
        """The whole of what `stream` gives.

        lm.generate("The capital of France is", max_tokens=8).text
        """
        return collect(
            self.stream(
                prompt, max_tokens=max_tokens, sampling=sampling, stop=stop, session=session
            )
        )

    def chat(
        self,
        *arguments: Any,
        query: str | None = None,
        history: Sequence[Message] | None = None,
        role: str = "user",
        max_tokens: int | None = 1024,
        max_length: int | None = None,
        do_sample: bool = True,
        num_beams: int = 1,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> tuple[str, list[dict[str, str]]]:
        """Answer `query`; the reply, and the history to give with the next one.

        Sampling is given by name (temperature, top_p, top_k, min_p, repetition_penalty, seed);
        `max_length` counts the prompt, `max_tokens` (None: as far as the context goes) does not.
        Called as MiniCPM's own code is, `chat(tokenizer, query, history, ...)`, the tokenizer is
        left aside for the model's own.

            reply, history = lm.chat("山东省最高的山是哪座山？", temperature=0.5, top_p=0.8)
        """
        if num_beams != 1:
            raise InvalidArgumentError(f"beam search is not supported; got num_beams={num_beams!r}")
        given = [item for item in arguments if not isinstance(item, Tokenizer)]
        text = given.pop(0) if given and query is None else query
        past = given.pop(0) if given and history is None else history
        if given or not isinstance(text, str):
            raise InvalidArgumentError(
                "chat takes one text to answer, chat(query) or chat(tokenizer, query, history); "
                f"got {shown(arguments if query is None else query)}"
            )
        expected = "a list of messages, as chat returns"
        turns = [] if past is None else listed("history", past, expected, is_message)
        messages = [*map(dict, turns), {"role": role, "content": text}]
        # Taken out meanwhile, so that a chat on another thread makes its own.
        session, self._session = self._session or self.session(), None
        completion = self.generate(
            messages,
            max_tokens=self._room(messages, max_length, max_tokens),
            sampling=sampled(self.sampling, do_sample=do_sample, **sampling),
            stop=stop,
            session=session,
        )
        self._session = session
        messages.append({"role": "assistant", "content": completion.text})
        return completion.text, messages

    def _room(
        self, messages: Sequence[Message], max_length: int | None, max_tokens: int | None
    ) -> int | None:
        """The longest reply that both limits allow."""
        if max_length is None:
            return max_tokens
        length = len(self.encode(messages))
        left = whole("max_length", max_length) - length
        if left < 1:
            raise InvalidArgumentError(
                f"the prompt has {length} tokens and max_length is {max_length}; "
                "raise it to leave room for a reply"
            )
        return left if max_tokens is None else min(left, at_least_one("max_tokens", max_tokens))


def load(
    name: str | Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    fuse: bool = True,
    adapter: str | Path | None = None,
    progress: bool = True,
) -> LM:
    """Load a model by card name, folder or hub repository (`org/name`), downloading it if need be.

    `dtype` and `device` override what this machine computes fastest on (see `doctor`). `fuse=False`
    keeps the form that is trained. `adapter` is a folder for `LM.use_adapter`. Raises
    ModelNotFoundError, DownloadError, ConfigError, WeightsError or TokenizerError.

        lm = load("demo")
    """
    card = resolve(str(name))
    devices.select(device)
    folder = folder_of(card, progress=progress)
    try:
        lm = _load_folder(card, folder, dtype, fuse)
    except (ConfigError, WeightsError, TokenizerError) as error:
        if card.path is not None:
            raise
        raise type(error)(
            f"{error}. If its files are damaged: `minicpm-mlx rm {card.name}`, then "
            f"`minicpm-mlx pull {card.name}`"
        ) from None
    if adapter is not None:
        lm.use_adapter(adapter)
    return lm


def _load_folder(card: Card, folder: Path, dtype: str | None, fuse: bool) -> LM:
    # The config first: a model that cannot be should not wait for its tokenizer.
    config = Config.load(folder)
    tokenizer = tokenizer_of(card, folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{config.vocab_size}; are its files those of another model?"
        )
    model = load_model(folder, dtype, fuse, weights=card.file if card.repo else None)
    return LM(model, tokenizer, card, _default_sampling(card, folder), folder)


def tokenizer_of(card: Card, folder: Path) -> Tokenizer:
    """The tokenizer in `folder`, with the end tokens and template of the card, if it has some."""
    tokenizer = load_tokenizer(folder, eos=card.eos or None)
    if card.template is not None:
        tokenizer.template = Template(BUILTIN[card.template])
    return tokenizer


def is_message(item: object) -> bool:
    return isinstance(item, Mapping)


def sampled(base: Sampling, *, do_sample: bool = True, **changes: Any) -> Sampling:
    """`base` with the fields that are given (None: not given) replaced."""
    expect("sampling", base, Sampling, "a Sampling, such as Sampling(temperature=0.7)")
    known = Sampling.__dataclass_fields__
    for name in changes:
        if name not in known:
            raise InvalidArgumentError(
                f"unknown option {name!r}; sampling has {', '.join(sorted(known))}"
            )
    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    if not do_sample:
        given["temperature"] = 0.0
    return replace(base, **given)


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


def _default_sampling(card: Card, folder: Path) -> Sampling:
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    values: dict[str, Any] = {
        name: getattr(card, name) for name in names if getattr(card, name) is not None
    }
    if values:
        return Sampling(**values)
    path = folder / "generation_config.json"
    with suppress(OSError, ValueError, AttributeError):
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.get("do_sample"):
            values = {n: raw[n] for n in names if isinstance(raw.get(n), (int, float))}
    try:
        return Sampling(**values)
    except InvalidArgumentError as error:
        raise ConfigError(f"{path}: {error}") from None
