"""Generation of a single stream, one token id at a time, with the device kept a step ahead."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from functools import partial

import mlx.core as mx

from ..arguments import at_least_one, expect
from ..errors import InvalidArgumentError, NumericsError
from ..memory import prefill_chunk
from ..model.config import Config
from ..model.modules import Pace
from .draw import UNDECIDED
from .sampling import NOT_A_NUMBER, Sampler, Sampling
from .session import LanguageModel, Session
from .speculative import Speculation
from .token_mask import Grammar


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
    next. Ids from `vocab_size` on, rows that pad the embedding, are never drawn. `speculation`
    makes it faster without changing the text. `grammar`, which is used up, restricts the tokens.
    The prompt is read in chunks of `chunk` tokens, by default as large as memory allows. The
    caller must watch the context length: beyond it a model continues, only worse.

    Each `next` may come from another thread. Raises InvalidArgumentError for an empty prompt, ids
    outside the vocabulary, arguments of a wrong type, or a session that is in use or belongs to
    another model; and NumericsError when the model produces NaN.
    """
    _check_prompt(model.config, prompt)
    max_tokens = at_least_one("max_tokens", max_tokens)
    sampling = Sampling() if sampling is None else sampling
    expect("sampling", sampling, Sampling, "a Sampling, such as Sampling(temperature=0.7)")
    session = Session(model.config) if session is None else session
    expect("session", session, Session, "a Session, as a model's session() gives")
    vocab_size = min(vocab_size or model.config.vocab_size, model.config.vocab_size)
    create_sampler = partial(Sampler, sampling, prompt, vocab_size, grammar=grammar, eos=eos)
    stream = Stream(model, session, create_sampler, speculation)
    pace = getattr(model, "pace", Pace())  # the reading form has none
    chunk = chunk or prefill_chunk(model.config, len(prompt), pace.most_prefill)
    if speculation is not None and pace.draft_costs:
        speculation.use_costs(pace.draft_costs)
    return _generate(stream, prompt, max_tokens, eos, chunk)


def _check_prompt(config: Config, prompt: Sequence[int]) -> None:
    if not prompt:
        raise InvalidArgumentError("the prompt is empty; expected at least one token")
    if not all(0 <= token < config.vocab_size for token in prompt):
        raise InvalidArgumentError(
            f"the prompt holds ids outside 0..{config.vocab_size - 1}; "
            "is the tokenizer that of another model?"
        )


def _generate(
    stream: Stream, prompt: Sequence[int], max_tokens: int, eos: Collection[int], chunk: int
) -> Generator[int, None, None]:
    """Yield tokens up to the end of the reply, with the session reserved."""
    with stream.session.reserved(stream.model):
        for count, token in enumerate(stream.tokens(prompt, max_tokens, chunk), 1):
            if token == NOT_A_NUMBER:
                raise NumericsError(
                    "the model produced NaN; expected numbers. Are the weights damaged, or is "
                    "float16 too narrow for them (try --dtype bfloat16 or float32)?"
                )
            yield token
            if token in eos or count == max_tokens:
                return


class Stream:
    """The forward passes of one stream, and the state between them."""

    def __init__(
        self,
        model: LanguageModel,
        session: Session,
        create_sampler: Callable[[], Sampler],
        speculation: Speculation | None,
    ):
        self.model, self.session, self.speculation = model, session, speculation
        self.create_sampler = create_sampler
        self.text: list[int] = []
        self.max_length = 0

    def tokens(self, prompt: Sequence[int], max_tokens: int, chunk: int) -> Iterator[int]:
        """Yield the tokens after `prompt`; the caller must not ask for more than `max_tokens`.

        Each step is launched before the token of the last one is read back, so that the device
        never waits for Python. That is not done while a draft is pending, which may make the step
        superfluous: drafts are verified in a pass of their own.
        """
        self.text, self.max_length = list(prompt), len(prompt) + max_tokens
        # Here rather than before: random state belongs to the thread that first uses it.
        self.sampler = self.create_sampler()
        token, draft = self._prefill(prompt, chunk), list[int]()
        run_ahead = False  # the first token is not delayed by the next step's launch
        while True:
            start = time.perf_counter()
            has_room = len(self.text) + 1 < self.max_length
            next_token = self._step(token) if run_ahead and not draft and has_room else None
            value = int(token.item())  # type: ignore[arg-type]
            if value == UNDECIDED:
                value, next_token = self._decide(next_token is not None), None
            if next_token is not None:
                self.session.ids.append(value)
                if self.speculation:
                    self.speculation.record_step(time.perf_counter() - start)
            self.text.append(value)
            yield value
            confirmed = draft[1:] if draft and draft[0] == value else []
            draft = confirmed if draft else self._draft_tokens()
            if next_token is not None:
                token = next_token
                continue
            while draft:
                yield from self._verify(draft)
                draft = self._draft_tokens()
            token, run_ahead = self._step(mx.array([self.text[-1]])), True
            self.session.ids.append(self.text[-1])

    def _prefill(self, prompt: Sequence[int], chunk: int) -> mx.array:
        """Read the prompt; return the first token (1,)."""
        tokens = prompt[self.session.rewind(prompt) :]
        for hidden in self.session.prefill(self.model, tokens, len(prompt), chunk):
            last = hidden[:, -1]  # (1, hidden)
        token = self.sampler(self.model.logits(last))
        mx.async_eval(token, self.sampler.arrays)
        return token

    def _step(self, token: mx.array) -> mx.array:
        """Launch the pass that reads `token` (1,); return the next token, not computed yet."""
        hidden = self.model.hidden(token[None], self.session.cache)
        next_token = self.sampler(self.model.logits(hidden)[:, -1])
        mx.async_eval(next_token, self.sampler.arrays)
        if self.speculation:
            self.speculation.passes += 1
        return next_token

    def _decide(self, is_read: bool) -> int:
        """Draw an undecided token again; `is_read` where a step has been launched that reads it."""
        for layer in self.session.cache:
            layer.trim(int(is_read))
        token = self.sampler(self.sampler.rewind(1 + is_read), decide=True)
        return int(token.item())  # type: ignore[arg-type]

    def _draft_tokens(self) -> list[int]:
        threshold = self.session.threshold
        limit = self.max_length if threshold is None else min(self.max_length, threshold)
        room = limit - len(self.text) - 1  # beyond a threshold, each position is rotated anew
        if self.speculation is None or room <= 0:
            return []
        return self.speculation.draft_tokens(self.text, room)

    def _verify(self, draft: list[int]) -> Iterator[int]:
        """Read the last token and the draft in one pass; yield the accepted tokens and one more."""
        assert self.speculation
        start = time.perf_counter()
        read = [self.text[-1], *draft]
        hidden = self.model.hidden(mx.array([read]), self.session.cache)
        tokens = self.sampler.verify(self.model.logits(hidden)[0], draft)
        mx.eval([layer.state for layer in self.session.cache], self.sampler.arrays)
        for layer in self.session.cache:
            layer.trim(len(read) - len(tokens))
        self.session.ids.extend(read[: len(tokens)])
        self.speculation.record_verified(len(draft), len(tokens) - 1, time.perf_counter() - start)
        for token in tokens:
            self.text.append(token)
            yield token
