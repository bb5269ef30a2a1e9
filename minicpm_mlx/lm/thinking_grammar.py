"""Keeps a thought within its budget, and a form to the answer that comes after it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..arguments import is_whole, shown
from ..engine import Grammar
from ..errors import InvalidArgumentError
from ..text.chat_prompt import ChatPrompt
from ..text.thinking import ThinkingForm
from ..text.tokenizer import Tokenizer


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
    may_think = prompt.may_think and (prompt.in_thought or form.is_by_token)
    if not may_think or (budget is None and answer is None):
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

    def text(self, token: int) -> bytes:
        return self.tokenizer.bytes_of(token)


@dataclass(frozen=True, kw_only=True)
class _State:
    """Where a reply is; each token makes the next."""

    in_thought: bool
    thought: int = 0
    """Tokens of the thought so far."""
    forced: tuple[int, ...] = ()
    """Tokens that must come next."""
    tail: bytes = b""
    """The end of the thought, for a mark that is text."""
    answered: int = 0
    """Tokens that `answer` has followed."""
    begun: bool = False
    """A token of the reply has come."""


class ThinkingGrammar:
    """A Grammar for a thought and the answer after it.

    A thought of `budget` tokens is closed, and the answer goes on from there. End of text does not
    come within a thought.
    """

    def __init__(
        self, marks: _Marks, budget: int | None, answer: Grammar | None, *, in_thought: bool
    ):
        self.marks, self.budget, self.answer = marks, budget, answer
        self.states = [self._bounded(_State(in_thought=in_thought))]

    @property
    def state(self) -> _State:
        return self.states[-1]

    @property
    def ended(self) -> bool:
        """Only end of text may follow."""
        state = self.state
        if state.in_thought or state.forced or self.answer is None:
            return False
        return self.answer.ended

    def allowed(self) -> np.ndarray:
        """The tokens that may come next: uint32 words, token t at bit t % 32 of word t // 32."""
        state, marks = self.state, self.marks
        if state.forced:
            return marks.only(state.forced[0])
        if state.in_thought:
            return marks.in_thought
        if self.answer is None:
            return marks.every
        bits = self.answer.allowed()
        opening = marks.form.opening_id
        if state.begun or opening is None:
            return bits
        first = marks.only(opening)  # a thought may come first
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
        elif token == self.marks.form.opening_id and (self.answer is None or not state.begun):
            after = self._bounded(replace(state, in_thought=True, thought=0))
        elif self.answer is not None:
            self.answer.accept(token)
            after = replace(state, answered=state.answered + 1)
        else:
            after = state
        self.states.append(replace(after, begun=True))

    def rollback(self, tokens: int) -> None:
        """Remove the last `tokens`."""
        if not 0 <= tokens < len(self.states):
            raise InvalidArgumentError(
                f"only {len(self.states) - 1} tokens can be taken back, got {tokens}"
            )
        answered = self.state.answered
        del self.states[len(self.states) - tokens :]
        if self.answer is not None:
            self.answer.rollback(answered - self.state.answered)

    def copy(self) -> ThinkingGrammar:
        """An independent copy."""
        answer = None if self.answer is None else self.answer.copy()
        copy = ThinkingGrammar(self.marks, self.budget, answer, in_thought=False)
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
        forced = state.forced or (self.marks.gap if self.answer is not None else ())
        return replace(state, in_thought=False, forced=forced, tail=b"")

    def _bounded(self, state: _State) -> _State:
        """`state`, which closes the thought where it has reached the budget."""
        if state.in_thought and self.budget is not None and state.thought >= self.budget:
            return replace(state, forced=self.marks.end)
        return state
