"""One stream: prompt ids in, one id at a time out, with the device kept a step ahead."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, Protocol

import mlx.core as mx

from ..arguments import at_least_one, expect, shown
from ..config import Config
from ..errors import InvalidArgumentError, NumericsError
from .cache import KVCache
from .sampling import NOT_A_NUMBER, Sampler, Sampling

CHUNK = 512
"""Prompt tokens a forward pass: more gains no speed and takes more memory."""


class LanguageModel(Protocol):
    """What the engine asks of a model: the twin and the fused form both have it."""

    config: Config
    adapter: str | None

    def hidden(
        self, ids: mx.array, cache: Sequence[Any] | None = None, length: int | None = None
    ) -> mx.array: ...

    def logits(self, hidden: mx.array) -> mx.array: ...


class Session:
    """A key-value cache and the ids in it, so that a text that begins alike need not be read again.

    What is reused was computed from the same ids in the same places: it never changes an answer.
    `kv_bits` (8 or 4) keeps the cache in about half or 28 % of a 16-bit format's memory, which does
    change answers a little.
    """

    def __init__(self, config: Config, kv_bits: int | None = None):
        if kv_bits not in (None, 4, 8):
            raise InvalidArgumentError(f"kv_bits must be 8 or 4, got {shown(kv_bits)}")
        if kv_bits is not None and config.head_dim % 32:
            raise InvalidArgumentError(
                f"kv_bits needs heads of a multiple of 32; this model's are {config.head_dim} wide"
            )
        self.config = config
        self.model: LanguageModel | None = None  # the one that read what is in the cache
        self.adapter: str | None = None  # and what it had on
        self.ids: list[int] = []
        self.cache = [KVCache(kv_bits) for _ in range(config.num_hidden_layers)]
        self.threshold = config.rotation_threshold
        self.length = 0  # of the text its keys were rotated for
        self._busy = Lock()

    @contextmanager
    def reserved(self, model: LanguageModel) -> Iterator[None]:
        """Held while a stream runs: two that wrote to one cache in turn would both be wrong."""
        if not self._busy.acquire(blocking=False):
            raise InvalidArgumentError(
                "this session is in the middle of another stream; finish or close that first, or "
                "give each its own session"
            )
        try:
            known = self.model is None or self.model is model
            if self.config != model.config or not known:
                raise InvalidArgumentError(
                    "this session holds what another model read; make one with session() of the "
                    "model it is for"
                )
            self.model = model
            yield
        finally:
            self._busy.release()

    def common(self, ids: Sequence[int]) -> int:
        """How many of `ids` are in the cache and need not be read."""
        if self.model is not None and self.adapter != self.model.adapter:
            return 0
        if self.threshold is not None and max(len(ids), self.length) > self.threshold:
            return 0  # a text of another length was rotated otherwise
        pairs = enumerate(zip(self.ids, ids, strict=False))
        alike = next((i for i, (known, wanted) in pairs if known != wanted), len(self.ids))
        return min(alike, len(ids) - 1)  # the last id is read anew, for its logits

    def rewind(self, ids: Sequence[int]) -> int:
        """Forget all but what `ids` begins with; how many of them need not be read."""
        common = self.common(ids)
        # By offset rather than by ids: an interrupted step may have written more than it noted.
        for layer in self.cache:
            layer.trim(layer.offset - common)
        del self.ids[common:]
        if self.model is not None:
            self.adapter = self.model.adapter
        return common

    def read(self, model: LanguageModel, ids: Sequence[int], length: int) -> mx.array:
        """Feed `ids`, the next of a text of `length`; the last hidden state (1, 1, hidden)."""
        hidden = model.hidden(mx.array([ids]), self.cache, length)[:, -1:]
        mx.eval(hidden, [layer.state for layer in self.cache])
        self.ids.extend(ids)
        self.length = length
        return hidden


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    eos: Collection[int] = (),
    session: Session | None = None,
    vocab_size: int | None = None,
    chunk: int = CHUNK,
) -> Generator[int, None, None]:
    """Continue `prompt` by up to `max_tokens` ids, greedily unless `sampling` says otherwise.

    An id of `eos` is yielded and ends the stream. `session` carries the cache from one call to the
    next. Ids from `vocab_size` on, rows that pad the embedding, are never drawn. The length of the
    context is the caller's affair: a model runs on beyond it, only worse.

    Each `next` may come from another thread. Raises InvalidArgumentError for an empty prompt, ids
    the model does not have, arguments of a wrong kind, or a session that is in use or another
    model's; and NumericsError when the model produces NaN.
    """
    _check(model.config, prompt)
    max_tokens = at_least_one("max_tokens", max_tokens)
    sampling = Sampling() if sampling is None else sampling
    expect("sampling", sampling, Sampling, "a Sampling, such as Sampling(temperature=0.7)")
    session = Session(model.config) if session is None else session
    expect("session", session, Session, "a Session, as a model's session() gives")
    vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
    return _stream(model, prompt, max_tokens, sampling, vocab_size, eos, session, chunk)


def _check(config: Config, prompt: Sequence[int]) -> None:
    if not prompt:
        raise InvalidArgumentError("the prompt is empty; expected at least one token")
    if not all(0 <= token < config.vocab_size for token in prompt):
        raise InvalidArgumentError(
            f"the prompt holds ids outside 0..{config.vocab_size - 1}; "
            "is the tokenizer that of another model?"
        )


def _stream(
    model: LanguageModel,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    vocab_size: int,
    eos: Collection[int],
    session: Session,
    chunk: int,
) -> Generator[int, None, None]:
    with session.reserved(model):
        sampler = Sampler(sampling, prompt, vocab_size)
        start = session.rewind(prompt)
        for begin in range(start, len(prompt), chunk):
            hidden = session.read(model, prompt[begin : begin + chunk], len(prompt))
        token = sampler(model.logits(hidden)[:, -1])
        mx.async_eval(token, sampler.state)
        for made in range(1, max_tokens + 1):
            following = None
            # From the second token on a step is launched before the last one is known, so that the
            # device never waits for Python. The first token waits for nothing.
            if 1 < made < max_tokens:
                following = _step(model, sampler, token, session)
            value = int(token.item())  # type: ignore[arg-type]
            if value == NOT_A_NUMBER:
                raise NumericsError(
                    "the model produced NaN; expected numbers. Are the weights damaged, or is "
                    "float16 too narrow for them (try --dtype bfloat16 or float32)?"
                )
            if following is not None:
                session.ids.append(value)
            yield value
            if value in eos or made == max_tokens:
                return
            if following is None:
                following = _step(model, sampler, token, session)
                session.ids.append(value)
            token = following


def _step(model: LanguageModel, sampler: Sampler, token: mx.array, session: Session) -> mx.array:
    """Launch the pass that reads `token` (1,); the next token."""
    following = sampler(model.logits(model.hidden(token[None], session.cache))[:, -1])
    mx.async_eval(following, sampler.state)
    return following
