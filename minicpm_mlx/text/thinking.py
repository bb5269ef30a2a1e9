"""How a model marks its thoughts, and what of a reply is thought and what is answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from .chat_template import Template

_MARKS = (("<think>", "</think>"), ("<|thought_start|>", "<|thought_end|>"))
"""Those of MiniCPM5 and 4.1, and of MiniCPM3."""


@dataclass(frozen=True, kw_only=True)
class ThinkingForm:
    """The marks around a thought, and the switch of a chat template."""

    opening: str
    closing: str
    opening_id: int | None = None
    """The token of the mark; None: both marks are ordinary text to the tokenizer."""
    closing_id: int | None = None
    has_switch: bool = False
    """Whether the template has the variable `enable_thinking`."""

    @property
    def is_by_token(self) -> bool:
        """Whether marks are told by their ids, so that no text can be taken for one."""
        return self.opening_id is not None

    def is_open(self, ids: list[int], text: str) -> bool:
        """Whether a prompt of these ids and this text ends within a thought."""
        if not self.is_by_token:
            return text.rstrip().endswith(self.opening)
        marks = (self.opening_id, self.closing_id)
        last = next((token for token in reversed(ids) if token in marks), None)
        return last == self.opening_id


THOUGHTS_OF_CALLS = ThinkingForm(opening=_MARKS[1][0], closing=_MARKS[1][1])
"""MiniCPM3's, before calls in Python, where its chat template has no thoughts."""


def thinking_form(template: Template | None, tokens: Mapping[str, int]) -> ThinkingForm | None:
    """The form that a chat template writes, if it knows thoughts; `tokens` are those added to the
    vocabulary, by name."""
    for opening, closing in _MARKS if template else ():
        if template and opening in template.source and closing in template.source:
            ids = tokens.get(opening), tokens.get(closing)
            both = None not in ids
            return ThinkingForm(
                opening=opening,
                closing=closing,
                opening_id=ids[0] if both else None,
                closing_id=ids[1] if both else None,
                has_switch="enable_thinking" in template.variables,
            )
    return None


class Phase(Enum):
    """Where a reply is."""

    START = 1
    """Before its first word: a thought may follow."""
    THINKING = 2
    ANSWER = 3


class ThoughtReader:
    """Splits a reply into thought and answer as its tokens come.

    Marks are left out, and so is the white space inside and after them. Where they are text to the
    tokenizer, a thought is at the beginning of a reply or nowhere.
    """

    def __init__(self, form: ThinkingForm, *, is_open: bool):
        self.form = form
        self.phase = Phase.THINKING if is_open else Phase.START
        self.held = ""
        """Text that may be part of a mark, or white space before one."""
        self._at_edge = is_open
        """After a mark: white space is left out."""

    def is_mark(self, token: int) -> bool:
        """Whether a token is one of the marks."""
        return self.form.is_by_token and token in (self.form.opening_id, self.form.closing_id)

    def mark(self, token: int) -> str:
        """Enter or leave the thought; the text of an answer that was held back."""
        is_thinking = self.phase is Phase.THINKING
        opens = token == self.form.opening_id
        if opens == is_thinking:  # within a thought, or a stray end
            return ""
        held, self.held = self.held, ""
        self.phase = Phase.THINKING if opens else Phase.ANSWER
        if opens or is_thinking:
            self._at_edge = True
        return held if opens and held.strip() else ""

    def add(self, text: str) -> tuple[str, str]:
        """What is certain of thought and answer after more `text`."""
        if self.phase is Phase.START:
            return self._start(text)
        if self.phase is Phase.THINKING:
            return self._think(text)
        return "", self._cut_edge(text)

    def finish(self) -> tuple[str, str]:
        """The rest at the end of the reply, without half a mark."""
        held, self.held = self.held, ""
        if self.phase is Phase.THINKING:
            at = len(held) - (0 if self.form.is_by_token else overlap(held, self.form.closing))
            return held[:at].rstrip(), ""
        return "", held

    def _start(self, text: str) -> tuple[str, str]:
        self.held += text
        begun = self.held.lstrip()
        if not begun:
            return "", ""
        opening = self.form.opening
        if not self.form.is_by_token:
            if begun.startswith(opening):
                self.phase, self.held, self._at_edge = Phase.THINKING, "", True
                return self._think(begun.removeprefix(opening))
            if opening.startswith(begun):
                return "", ""
        self.phase = Phase.ANSWER
        text, self.held = self.held, ""
        return "", text

    def _think(self, text: str) -> tuple[str, str]:
        self.held += self._cut_edge(text)
        closing, end = self.form.closing, len(self.held)
        if not self.form.is_by_token:
            if (at := self.held.find(closing)) >= 0:
                thought, answer = self.held[:at], self.held[at + len(closing) :]
                self.phase, self.held, self._at_edge = Phase.ANSWER, "", True
                return thought.rstrip(), self._cut_edge(answer)
            end -= overlap(self.held, closing)
        thought = self.held[:end].rstrip()
        self.held = self.held[len(thought) :]
        return thought, ""

    def _cut_edge(self, text: str) -> str:
        if self._at_edge:
            text = text.lstrip()
            self._at_edge = not text
        return text


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` that is a beginning of `mark`, not the whole of it."""
    sizes = range(min(len(text), len(mark) - 1), 0, -1)
    return next((size for size in sizes if mark.startswith(text[-size:])), 0)
