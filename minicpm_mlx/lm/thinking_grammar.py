"""Keeps a thought within its budget, and a form to the answer that comes after it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from ..arguments import is_whole, shown
from ..engine import Grammar
from ..errors import InvalidArgumentError
from ..text.chat_prompt import ChatPrompt
from ..text.thinking import ThinkingForm
from ..text.tokenizer import Tokenizer
from .tools.held_calls import HeldCalls


def thinking_grammar(
    tokenizer: Tokenizer, prompt: ChatPrompt, budget: int | None, answer: Grammar | None = None
) -> Grammar | None:
    """The grammar of a reply whose thought has at most `budget` tokens and whose answer follows
    `answer`; `answer` itself where no thought can come before it.

    InvalidArgumentError for a budget of less than 0, or for a model that does not think.
    """
    form = prompt.thinking
    if budget is not None and (not is_whole(budget) or budget < 0):
        raise InvalidArgumentError(
            f"must be a whole number from 0 on, got {shown(budget)}", field="think_tokens"
        )
    if form is None:
        if budget is None:
            return answer
        raise InvalidArgumentError(
            "this model does not think before it answers; leave it out", field="think_tokens"
        )
    if not prompt.may_think or (budget is None and answer is None):
        return answer
    return ThinkingGrammar(_Marks(tokenizer, form), budget, answer, in_thought=prompt.in_thought)


class _Marks:
    """The tokens of a form's marks, and masks over the vocabulary."""

    def __init__(self, tokenizer: Tokenizer, form: ThinkingForm):
        self.tokenizer, self.form = tokenizer, form
        self.eos = frozenset(tokenizer.eos_ids)
        self.end = tuple(self._encode(f"\n{form.closing}\n\n"))
        """Closes a thought that is too long, as a chat template does it."""
        self.gap = tuple(self._encode("\n\n"))
        """Between the mark and an answer that has a form."""
        self.following = lru_cache(self._following)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_bos=False)

    @cached_property
    def words(self) -> int:
        return -(-max(self.tokenizer.vocab_size, *(token + 1 for token in self.eos)) // 32)

    @cached_property
    def every(self) -> np.ndarray:
        """All tokens."""
        return np.full(self.words, 0xFFFFFFFF, "<u4")

    @cached_property
    def in_thought(self) -> np.ndarray:
        """All but those that would end the reply before its answer."""
        bits = self.every.copy()
        for token in self.eos:
            bits[token // 32] &= ~np.uint32(1 << token % 32)
        return bits

    def only(self, token: int) -> np.ndarray:
        bits = np.zeros(self.words, "<u4")
        bits[token // 32] = 1 << token % 32
        return bits

    def _following(self, begun: bytes) -> np.ndarray:
        """The token that goes on with the opening mark, of which `begun` is there."""
        form = self.form
        if form.opening_id is not None:
            return self.only(form.opening_id)
        rest = form.opening.encode()[len(begun) :].decode(errors="ignore")
        return self.only(self._encode(rest)[0])

    def text(self, token: int) -> bytes:
        return self.tokenizer.bytes_of(token)


@dataclass(frozen=True, kw_only=True)
class _State:
    """Where a reply is; each token makes the next."""

    in_thought: bool = False
    thought: int = 0
    """Tokens of the thought so far."""
    forced: tuple[int, ...] = ()
    """Tokens that must come next."""
    tail: bytes = b""
    """The end of the thought, for a mark that is text."""
    answered: tuple[int, int] = (0, 0)
    """Tokens that the answer has followed: without a thought, and after one."""
    begun: bytes | None = b""
    """The reply so far, where it can be the beginning of the opening mark."""
    thought_first: bool = False
    """A thought has come."""


class ThinkingGrammar:
    """A Grammar for a thought and the answer after it.

    A thought of `budget` tokens is closed, and the answer goes on from there. End of text does not
    come within a thought.
    """

    def __init__(
        self, marks: _Marks, budget: int | None, answer: Grammar | None, *, in_thought: bool
    ):
        self.marks, self.budget = marks, budget
        self.answers = None if answer is None else (answer, answer.copy())
        """Without a thought, and after one: the mark may begin as the answer does."""
        self.gap = () if answer is None or isinstance(answer, HeldCalls) else marks.gap
        """Tokens between a thought and its answer that must come; where text is free, none."""
        start = _State(in_thought=True, thought_first=True, begun=None) if in_thought else _State()
        self.states = [self._bounded(start)]

    @property
    def state(self) -> _State:
        return self.states[-1]

    @property
    def answer(self) -> Grammar | None:
        """That of the answer as it has come so far."""
        return self.answers[self.state.thought_first] if self.answers else None

    @property
    def ended(self) -> bool:
        """Only end of text may follow."""
        state = self.state
        if state.in_thought or state.forced or self.answer is None:
            return False
        return self._is_answer and self.answer.ended

    @property
    def _is_answer(self) -> bool:
        """Whether what has come can begin an answer, and not the mark alone."""
        return self.state.begun is None or self.state.answered[0] == len(self.states) - 1

    @property
    def _is_free(self) -> bool:
        """Whether any text may come here, another thought too."""
        answer = self.answer
        return answer is None or (isinstance(answer, HeldCalls) and answer.in_text)

    def allowed(self) -> np.ndarray:
        """The tokens that may come next: uint32 words, token t at bit t % 32 of word t // 32."""
        state, marks = self.state, self.marks
        if state.forced:
            return marks.only(state.forced[0])
        if state.in_thought:
            return marks.in_thought
        if self.answer is None:
            return marks.every
        if state.begun is None:
            return self.answer.allowed()
        first = marks.following(state.begun)  # a thought may come first
        if not self._is_answer:
            return first
        bits = self.answer.allowed()
        size = max(bits.size, first.size)
        return np.pad(bits, (0, size - bits.size)) | np.pad(first, (0, size - first.size))

    def accept(self, token: int) -> None:
        """Append a token; InvalidArgumentError where it is not allowed."""
        state = self.state
        if state.forced:
            if token != state.forced[0]:
                raise InvalidArgumentError(f"token {token} cannot follow")
            after = replace(state, forced=state.forced[1:])
            after = self._thinking(after, token) if state.in_thought else after
        elif state.in_thought:
            after = self._bounded(self._thinking(state, token))
        else:
            after = self._opening(state, token)
            if not after.in_thought:
                after = self._answering(after, token)
        self.states.append(after)

    def _opening(self, state: _State, token: int) -> _State:
        """The state after a token that may belong to the opening mark."""
        form = self.marks.form
        if form.is_by_token:
            opens = token == form.opening_id and (state.begun is not None or self._is_free)
            state = replace(state, begun=None)
        elif state.begun is None:
            return state
        else:
            mark, text = form.opening.encode(), state.begun + self.marks.text(token)
            opens = text.startswith(mark)
            state = replace(state, begun=text if mark.startswith(text) else None)
        if not opens:
            return state
        return self._bounded(
            replace(state, in_thought=True, begun=None, thought=0, thought_first=True)
        )

    def _answering(self, state: _State, token: int) -> _State:
        """The state after a token of the answer, or of the mark, which may begin alike."""
        if self.answers is None:
            return state
        if not self._is_answer:
            if state.begun is None:
                raise InvalidArgumentError(f"token {token} cannot follow")
            return state
        answer = self.answers[state.thought_first]
        if state.begun is not None and not _has(answer.allowed(), token):
            return state
        answer.accept(token)
        direct, later = state.answered
        answered = (direct, later + 1) if state.thought_first else (direct + 1, later)
        return replace(state, answered=answered)

    def rollback(self, tokens: int) -> None:
        """Remove the last `tokens`."""
        if not 0 <= tokens < len(self.states):
            raise InvalidArgumentError(
                f"only {len(self.states) - 1} tokens can be taken back, got {tokens}"
            )
        before = self.state.answered
        del self.states[len(self.states) - tokens :]
        for answer, last, now in zip(self.answers or (), before, self.state.answered, strict=False):
            answer.rollback(last - now)

    def copy(self) -> ThinkingGrammar:
        """An independent copy."""
        copy = ThinkingGrammar(self.marks, self.budget, None, in_thought=False)
        if self.answers is not None:
            copy.answers = (self.answers[0].copy(), self.answers[1].copy())
        copy.gap = self.gap
        copy.states = list(self.states)
        return copy

    def _thinking(self, state: _State, token: int) -> _State:
        """The state after a token of the thought."""
        form = self.marks.form
        if form.is_by_token:
            closed, tail = token == form.closing_id, b""
        else:
            mark = form.closing.encode()
            text = state.tail + self.marks.text(token)
            closed, tail = mark in text, text[-len(mark) :]
        if not closed:
            return replace(state, thought=state.thought + 1, tail=tail)
        forced = state.forced or self.gap
        return replace(state, in_thought=False, forced=forced, tail=b"")

    def _bounded(self, state: _State) -> _State:
        """`state`, which closes the thought where it has reached the budget."""
        if state.in_thought and self.budget is not None and state.thought >= self.budget:
            return replace(state, forced=self.marks.end)
        return state


def _has(bits: np.ndarray, token: int) -> bool:
    """Whether a mask allows a token."""
    return token // 32 < bits.size and bool(bits[token // 32] >> (token % 32) & 1)
