"""Chunked prefill of one request, with the log probabilities or the embedding of its prompt."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..logprobs import LogprobRows, TokenLogprob
from ..session import LanguageModel, prefill
from .requests import PrefillDone, Request

LOGIT_ROWS = 64
"""Positions whose logits are computed at once; those of a whole chunk would fill the memory."""


class Prefill:
    """Reads the prompt of `request`; `cache` holds its first tokens, from the prefix cache.

    The last token is left to the batch where a reply follows.
    """

    def __init__(self, model: LanguageModel, request: Request, cache: list[Any] | None):
        from mlx_lm.models.cache import KVCache

        self.model, self.request = model, request
        self.cache = cache or [KVCache() for _ in range(model.config.num_hidden_layers)]
        self.position = self.cached_tokens = self.cache[0].offset
        self.end = len(request.prompt) - (request.max_tokens > 0)
        self.prompt_logprobs: list[TokenLogprob] = []
        if request.logprob_start == 0:
            self.prompt_logprobs.append(TokenLogprob(request.prompt[0]))
        self.hidden_sum = mx.zeros((model.config.hidden_size,))

    @property
    def done(self) -> bool:
        return self.position == self.end

    def advance(self, chunk: int) -> int:
        """Read up to `chunk` more tokens; return how many were read."""
        tokens = self.request.prompt[self.position : min(self.position + chunk, self.end)]
        (hidden,) = prefill(self.model, tokens, self.cache, chunk=chunk)
        hidden = hidden[0]  # (T, hidden)
        if self.request.logprob_start is not None:
            self._score(hidden, self.request.logprob_start)
        if self.request.embed:
            self.hidden_sum = self.hidden_sum + hidden.astype(mx.float32).sum(axis=0)
        mx.eval(self.hidden_sum)
        self.position += len(tokens)
        return len(tokens)

    def _score(self, hidden: mx.array, logprob_start: int) -> None:
        """Score the tokens that follow the positions of hidden (T, hidden)."""
        prompt, top = self.request.prompt, self.request.top_logprobs or 0
        start = max(self.position + 1, logprob_start)
        end = min(self.position + len(hidden) + 1, len(prompt))
        for begin in range(start, end, LOGIT_ROWS):
            tokens = list(prompt[begin : min(begin + LOGIT_ROWS, end)])
            row = begin - 1 - self.position
            logits = self.model.logits(hidden[row : row + len(tokens)])
            self.prompt_logprobs.extend(LogprobRows(logits, mx.array(tokens), top).to_list(tokens))

    def result(self) -> PrefillDone:
        """Return the event that reports the prompt, once all of it is read."""
        mean: Any = (self.hidden_sum / len(self.request.prompt)).tolist()
        return PrefillDone(
            self.cached_tokens,
            tuple(self.prompt_logprobs),
            tuple(mean) if self.request.embed else (),
            final=not self.request.max_tokens,
        )
