"""Guesses by a smaller model of the same vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from .generate import generate
from .session import LanguageModel, Session


class Draft:
    """Guesses what a smaller model would say, greedily."""

    def __init__(self, model: LanguageModel, vocab_size: int):
        self.model, self.vocab_size = model, vocab_size
        self.session = Session(model.config)

    def find(self, text: Sequence[int]) -> int:
        """It always has a guess, none surer than another."""
        return 1

    def guess(self, text: Sequence[int], count: int) -> list[int]:
        tokens = generate(
            self.model, text, max_tokens=count, session=self.session, vocab_size=self.vocab_size
        )
        return list(tokens)
