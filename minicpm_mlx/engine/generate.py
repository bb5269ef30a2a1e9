"""One stream: prompt ids in, one id at a time out, with the device kept a step ahead."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from functools import partial

import mlx.core as mx

from ..arguments import at_least_one, expect
from ..errors import InvalidArgumentError, NumericsError
from ..memory import chunk_of
from ..model.config import Config
from .grammar import Grammar
from .sampling import NOT_A_NUMBER, Sampler, Sampling
from .session import LanguageModel, Session
from .speculative import Speculation


def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    eos: Collection[int] = (),
    session: Session | None = None,
    vocab_size: int | None = None,
    chunk: int | None = None,
    speculation: Speculation | None = None,
    grammar: Grammar | None = None,
) -> Generator[int, None, None]:
    """Continue `prompt` by up to `max_tokens` ids, greedily unless `sampling` says otherwise.

    An id of `eos` is yielded and ends the stream. `session` carries the cache from one call to the
    next. Ids from `vocab_size` on, rows that pad the embedding, are never drawn. `speculation` may
    make it faster, and leaves the text as it is. `grammar`, which is used up, says what may be
    drawn. `chunk` tokens of the prompt are read at once, by
    default as many as memory has room for. The length of the context is the caller's affair:
    a model runs on beyond it, only worse.

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
    sampler = partial(Sampler, sampling, prompt, vocab_size, grammar=grammar, eos=eos)
    stream = Stream(model, session, sampler, speculation)
    return _limited(stream, prompt, max_tokens, eos, chunk or chunk_of(model.config))


def _check(config: Config, prompt: Sequence[int]) -> None:
    if not prompt:
        raise InvalidArgumentError("the prompt is empty; expected at least one token")
    if not all(0 <= token < config.vocab_size for token in prompt):
        raise InvalidArgumentError(
            f"the prompt holds ids outside 0..{config.vocab_size - 1}; "
            "is the tokenizer that of another model?"
        )


def _limited(
    stream: Stream, prompt: Sequence[int], max_tokens: int, eos: Collection[int], chunk: int
) -> Generator[int, None, None]:
    with stream.session.reserved(stream.model):
        for made, token in enumerate(stream.tokens(prompt, max_tokens, chunk), 1):
            if token == NOT_A_NUMBER:
                raise NumericsError(
                    "the model produced NaN; expected numbers. Are the weights damaged, or is "
                    "float16 too narrow for them (try --dtype bfloat16 or float32)?"
                )
            yield token
            if token in eos or made == max_tokens:
                return


class Stream:
    """The passes of one stream, and what is known between them."""

    def __init__(
        self,
        model: LanguageModel,
        session: Session,
        sampler: Callable[[], Sampler],
        speculation: Speculation | None,
    ):
        """`sampler` is made by the thread that draws first, since random numbers are."""
        self.model, self.session, self.speculation = model, session, speculation
        self.make_sampler = sampler
        self.text: list[int] = []
        self.end = 0
        """Length that the text may reach."""

    def tokens(self, prompt: Sequence[int], max_tokens: int, chunk: int) -> Iterator[int]:
        """The tokens after `prompt`; more than `max_tokens` must not be asked for."""
        self.text, self.end = list(prompt), len(prompt) + max_tokens
        self.sampler = self.make_sampler()
        token, guesses = self._read(prompt, chunk), list[int]()
        ahead = False  # the first token waits for nothing
        while True:
            # A step is launched before the last token is known, so that the device never waits for
            # Python; but where a guess may come true, which would make it superfluous.
            start = time.perf_counter()
            more = ahead and not guesses and len(self.text) + 1 < self.end
            following = self._step(token) if more else None
            value = int(token.item())  # type: ignore[arg-type]
            if following is not None:
                self.session.ids.append(value)
                if self.speculation:
                    self.speculation.stepped(time.perf_counter() - start)
            self.text.append(value)
            yield value
            confirmed = guesses[1:] if guesses and guesses[0] == value else []
            guesses = confirmed if guesses else self._guesses()
            if following is not None:
                token = following
                continue
            while guesses:
                yield from self._verified(guesses)
                guesses = self._guesses()
            token, ahead = self._step(mx.array([self.text[-1]])), True
            self.session.ids.append(self.text[-1])

    def _read(self, prompt: Sequence[int], chunk: int) -> mx.array:
        """Read the prompt; the first token (1,)."""
        for begin in range(self.session.rewind(prompt), len(prompt), chunk):
            part = prompt[begin : begin + chunk]
            hidden = self.session.read(self.model, part, len(prompt))
        token = self.sampler(self.model.logits(hidden)[:, -1])
        mx.async_eval(token, self.sampler.state)
        return token

    def _step(self, token: mx.array) -> mx.array:
        """Launch the pass that reads `token` (1,); the next token."""
        hidden = self.model.hidden(token[None], self.session.cache)
        following = self.sampler(self.model.logits(hidden)[:, -1])
        mx.async_eval(following, self.sampler.state)
        if self.speculation:
            self.speculation.passes += 1
        return following

    def _guesses(self) -> list[int]:
        """What is worth checking at the next pass."""
        threshold = self.session.threshold
        limit = self.end if threshold is None else min(self.end, threshold)
        room = limit - len(self.text) - 1  # beyond a threshold, each position is rotated anew
        return self.speculation.guesses(self.text, room) if self.speculation and room > 0 else []

    def _verified(self, guesses: list[int]) -> Iterator[int]:
        """Read the last token and the guesses in one pass; those that are right, and one more."""
        assert self.speculation
        start = time.perf_counter()
        read = [self.text[-1], *guesses]
        hidden = self.model.hidden(mx.array([read]), self.session.cache)
        values = self.sampler.check(self.model.logits(hidden)[0], guesses)
        mx.eval([layer.state for layer in self.session.cache], self.sampler.state)
        for layer in self.session.cache:
            layer.trim(len(read) - len(values))
        self.session.ids.extend(read[: len(values)])
        self.speculation.checked(len(guesses), len(values) - 1, time.perf_counter() - start)
        for value in values:
            self.text.append(value)
            yield value
