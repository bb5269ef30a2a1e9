"""Text in which calls may come, each held to its schema from the token that opens it."""

from __future__ import annotations

import numpy as np

from ...engine import Grammar
from ...errors import InvalidArgumentError

_TEXT, _DONE = -1, -2
"""States outside of a block: text, and after the only block."""


class HeldCalls:
    """A Grammar that leaves text free and follows `block` after each token `opening`.

    `every` and `ends` are masks of all tokens and of those that end a reply. A token of `apart`
    goes on with text, as the opening one was no call's. Without `several` a block ends the reply.
    """

    def __init__(
        self,
        opening: int,
        block: Grammar,
        *,
        every: np.ndarray,
        ends: np.ndarray,
        apart: np.ndarray | None = None,
        several: bool = True,
    ):
        self.opening, self.block, self.several = opening, block, several
        self.every, self.ends, self.apart = every, ends, apart
        self.tokens: list[int] = []
        self.states = [_TEXT]
        """Where the reply was before each token, and is now: how many of a block have come."""
        self.current: Grammar | None = None
        """Follows the block that is open."""

    @property
    def in_text(self) -> bool:
        """Whether text may go on here."""
        return self.states[-1] == _TEXT

    @property
    def ended(self) -> bool:
        """Only end of text may follow."""
        return self.states[-1] == _DONE

    def allowed(self) -> np.ndarray:
        """The tokens that may come next: uint32 words, token t at bit t % 32 of word t // 32."""
        if self.current is None:
            return self.every if self.in_text else self.ends
        bits = self.current.allowed()
        return bits | self.apart if self.states[-1] == 0 and self.apart is not None else bits

    def accept(self, token: int) -> None:
        """Append a token; InvalidArgumentError where it is not allowed."""
        state = self.states[-1]
        if state == _DONE:
            raise InvalidArgumentError(f"the text has ended; token {token} cannot follow")
        if self.current is None:
            self.current = self.block.copy() if token == self.opening else None
            after = _TEXT if self.current is None else 0
        elif state == 0 and _has(self.apart, token):
            after, self.current = _TEXT, None
        else:
            self.current.accept(token)
            after = state + 1
            if self.current.ended:
                after, self.current = _TEXT if self.several else _DONE, None
        self.tokens.append(token)
        self.states.append(after)

    def rollback(self, tokens: int) -> None:
        """Remove the last `tokens`."""
        count = len(self.tokens)
        if not 0 <= tokens <= count:
            raise InvalidArgumentError(f"only {count} tokens can be taken back, got {tokens}")
        state = self.states[count - tokens]
        is_same = self.current is not None and min(self.states[count - tokens :]) >= 0
        if is_same and self.states[-1] - state == tokens:
            assert self.current
            self.current.rollback(tokens)
        else:
            self.current = self.block.copy() if state >= 0 else None
            for token in self.tokens[count - tokens - max(state, 0) : count - tokens]:
                if self.current is not None:
                    self.current.accept(token)
        del self.tokens[count - tokens :], self.states[count - tokens + 1 :]

    def copy(self) -> HeldCalls:
        """An independent copy."""
        copy = HeldCalls(
            self.opening,
            self.block,
            every=self.every,
            ends=self.ends,
            apart=self.apart,
            several=self.several,
        )
        copy.tokens, copy.states = list(self.tokens), list(self.states)
        copy.current = None if self.current is None else self.current.copy()
        return copy


def _has(bits: np.ndarray | None, token: int) -> bool:
    """Whether a mask has a token."""
    if bits is None or token // 32 >= bits.size:
        return False
    return bool(bits[token // 32] >> (token % 32) & 1)
