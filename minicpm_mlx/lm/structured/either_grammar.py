"""A grammar of texts that one grammar of several allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...engine.token_mask import Grammar
from ...errors import InvalidArgumentError


class EitherGrammar:
    """A Grammar that follows `grammars` side by side, and drops each where the text leaves it."""

    def __init__(self, grammars: Sequence[Grammar]):
        self.grammars = list(grammars)
        self.followed = [0] * len(self.grammars)
        """Tokens that each has accepted; fewer than `count` where the text left it."""
        self.count = 0

    def _open(self) -> list[int]:
        return [i for i, followed in enumerate(self.followed) if followed == self.count]

    @property
    def ended(self) -> bool:
        """Only end of text may follow."""
        return all(self.grammars[i].ended for i in self._open())

    def allowed(self) -> np.ndarray:
        """The tokens that may come next: uint32 words, token t at bit t % 32 of word t // 32."""
        bits = [self.grammars[i].allowed() for i in self._open()]
        size = max(one.size for one in bits)
        joined = np.zeros(size, np.uint32)
        for one in bits:
            joined[: one.size] |= one
        return joined

    def accept(self, token: int) -> None:
        """Append a token; InvalidArgumentError where it is not allowed."""
        taking = self._open()
        if len(taking) > 1:
            taking = [i for i in taking if _allows(self.grammars[i], token)]
        if not taking:
            raise InvalidArgumentError(f"token {token} cannot follow")
        for i in taking:
            self.grammars[i].accept(token)
            self.followed[i] += 1
        self.count += 1

    def rollback(self, tokens: int) -> None:
        """Remove the last `tokens`."""
        if not 0 <= tokens <= self.count:
            raise InvalidArgumentError(f"only {self.count} tokens can be taken back, got {tokens}")
        self.count -= tokens
        for i, followed in enumerate(self.followed):
            self.grammars[i].rollback(max(followed - self.count, 0))
            self.followed[i] = min(followed, self.count)

    def copy(self) -> EitherGrammar:
        """An independent copy."""
        copy = EitherGrammar([grammar.copy() for grammar in self.grammars])
        copy.followed, copy.count = list(self.followed), self.count
        return copy


def _allows(grammar: Grammar, token: int) -> bool:
    bits = grammar.allowed()
    return token // 32 < bits.size and bool(bits[token // 32] >> (token % 32) & 1)
