"""Masks the logits of tokens that a grammar forbids.

`lm/structured/` makes grammars from JSON schemas, regular expressions and Lark grammars.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx
import numpy as np


class Grammar(Protocol):
    """Follows one text and restricts its next token.

    `allowed` and `accept` raise InvalidArgumentError where parsing exceeds the grammar's limits,
    or where no token may follow.
    """

    @property
    def ended(self) -> bool:
        """Whether only the end of text may follow."""
        ...

    def allowed(self) -> np.ndarray:
        """Return the allowed tokens as uint32 words: token t is bit t % 32 of word t // 32."""
        ...

    def accept(self, token: int) -> None:
        """Append a token, which must be allowed."""
        ...

    def rollback(self, tokens: int) -> None:
        """Undo the last `tokens` accepted."""
        ...

    def copy(self) -> Grammar:
        """Return an independent copy in the same state."""
        ...


def masked(logits: mx.array, bits: np.ndarray) -> mx.array:
    """Return logits (V,) with -inf for tokens that `bits` do not allow, unpacked on the device.

    Tokens beyond the end of `bits`, rows that pad the embedding, are not allowed.
    """
    missing = -(-logits.size // 32) - bits.size
    if missing > 0:
        bits = np.pad(bits, (0, missing))
    words = mx.array(bits)[:, None] >> mx.arange(32, dtype=mx.uint32)
    return mx.where((words & 1).reshape(-1)[: logits.size] == 1, logits, -mx.inf)
