"""What a text may say, token by token."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx
import numpy as np


class Grammar(Protocol):
    """Follows one text and says which tokens may come next.

    `allowed` and `accept` raise InvalidArgumentError where following it takes more than its limits
    permit, or where nothing may follow.
    """

    @property
    def ended(self) -> bool:
        """Only end of text may follow."""
        ...

    def allowed(self) -> np.ndarray:
        """The tokens that may come next: uint32 words, token t at bit t % 32 of word t // 32."""
        ...

    def accept(self, token: int) -> None:
        """Append a token, which must be allowed."""
        ...

    def rollback(self, tokens: int) -> None:
        """Take the last `tokens` back."""
        ...

    def copy(self) -> Grammar:
        """One that goes on from here by itself."""
        ...


def masked(logits: mx.array, bits: np.ndarray) -> mx.array:
    """Logits (V,) with tokens that are not allowed at -inf; unpacked on the device.

    What `bits` do not reach to, rows that pad the embedding, is not allowed.
    """
    missing = -(-logits.size // 32) - bits.size
    if missing > 0:
        bits = np.pad(bits, (0, missing))
    words = mx.array(bits)[:, None] >> mx.arange(32, dtype=mx.uint32)
    return mx.where((words & 1).reshape(-1)[: logits.size] == 1, logits, -mx.inf)
