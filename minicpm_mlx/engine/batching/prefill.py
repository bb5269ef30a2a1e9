"""A prompt, read a chunk at a time; and what is asked of its own tokens."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..logprobs import Scored, Scores
from ..session import LanguageModel
from .requests import Read, Request

ROWS = 64
"""Positions whose logits are computed at once; those of a whole chunk would fill the memory."""


class Prefill:
    """Reads the prompt of `request`; `cache` holds keys and values of what need not be read.

    The last token is left to the batch where a reply follows.
    """

    def __init__(self, model: LanguageModel, request: Request, cache: list[Any] | None):
        from mlx_lm.models.cache import KVCache

        self.model, self.request = model, request
        self.cache = cache or [KVCache() for _ in range(model.config.num_hidden_layers)]
        self.at = self.cached = self.cache[0].offset
        self.end = len(request.prompt) - (request.max_tokens > 0)
        self.scored: list[Scored] = []
        if request.score_from == 0:
            self.scored.append(Scored(request.prompt[0]))
        self.total = mx.zeros((model.config.hidden_size,))

    @property
    def done(self) -> bool:
        return self.at == self.end

    def advance(self, chunk: int) -> int:
        """Read up to `chunk` more tokens; how many."""
        part = self.request.prompt[self.at : min(self.at + chunk, self.end)]
        hidden = self.model.hidden(mx.array([part]), self.cache)[0]  # (T, hidden)
        if self.request.score_from is not None:
            self._score(hidden, self.request.score_from)
        if self.request.pooled:
            self.total = self.total + hidden.astype(mx.float32).sum(axis=0)
        mx.eval([layer.state for layer in self.cache], self.total)
        self.at += len(part)
        return len(part)

    def _score(self, hidden: mx.array, score_from: int) -> None:
        """Score the tokens that follow the positions of hidden (T, hidden), from `score_from`."""
        prompt, top = self.request.prompt, self.request.top or 0
        start = max(self.at + 1, score_from)
        end = min(self.at + len(hidden) + 1, len(prompt))
        for begin in range(start, end, ROWS):
            tokens = list(prompt[begin : min(begin + ROWS, end)])
            row = begin - 1 - self.at
            logits = self.model.logits(hidden[row : row + len(tokens)])
            self.scored.extend(Scores(logits, mx.array(tokens), top).rows(tokens))

    @property
    def result(self) -> Read:
        """Once all is read."""
        mean: Any = (self.total / len(self.request.prompt)).tolist()
        pooled = tuple(mean) if self.request.pooled else ()
        return Read(self.cached, tuple(self.scored), pooled, last=not self.request.max_tokens)
