"""Draft tokens from a smaller model of the same vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from .generate import generate
from .session import LanguageModel, Session


class DraftModel:
    """Drafts greedily with `model`."""

    def __init__(self, model: LanguageModel, vocab_size: int):
        self.model, self.vocab_size = model, vocab_size
        self.session = Session(model.config)

    def confidence(self, text: Sequence[int]) -> int:
        """Return 1: there is always a draft, and all are alike."""
        return 1

    def propose(self, text: Sequence[int], count: int) -> list[int]:
        tokens = generate(
            self.model, text, max_tokens=count, session=self.session, vocab_size=self.vocab_size
        )
        return list(tokens)
