"""Requests to the scheduler, its events, and the plan of a step that ranks exchange."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from ..logprobs import TokenLogprob
from ..sampling import Sampling
from ..token_mask import Grammar


@dataclass(kw_only=True, eq=False)
class Request:
    """A prompt to read, and to continue unless `max_tokens` is 0."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str | None = None
    """Name of the adapter to use; None: the model without one."""
    eos: frozenset[int] = frozenset()
    """Tokens that end the reply."""
    min_tokens: int = 0
    """Tokens to generate before one of `eos` may come."""
    grammar: Grammar | None = None
    top_logprobs: int | None = None
    """Report each token's log probability and this many of the likeliest tokens; None: neither."""
    logprob_start: int | None = None
    """Report log probabilities of the prompt's tokens from this position on."""
    embed: bool = False
    """Report the mean of the last hidden states; generate nothing."""
    deadline: float | None = None
    """Time at which the request is given up, by time.monotonic()."""
    request_id: int = field(default_factory=count().__next__)
    """Identifies the request on all ranks."""

    @property
    def max_positions(self) -> int:
        """Positions in the key-value cache that the request may take."""
        return len(self.prompt) + self.max_tokens

    @property
    def reusable_tokens(self) -> int:
        """Tokens of the prompt that may come from the prefix cache.

        A scored token needs the logits of the position before it, an embedding all hidden states.
        """
        if self.embed:
            return 0
        limit = len(self.prompt) - (self.max_tokens > 0)  # the last token's logits start the reply
        if self.logprob_start is None:
            return limit
        return max(min(self.logprob_start - 1, limit), 0)


class PrefillDone(NamedTuple):
    """The prompt has been read."""

    cached_tokens: int
    """Tokens of the prompt that came from the prefix cache."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """The prompt's tokens from `logprob_start` on."""
    embedding: tuple[float, ...] = ()
    """Mean of the last hidden states, (hidden,)."""
    final: bool = False
    """Whether this is the request's last event."""


class NewToken(NamedTuple):
    """A token of the reply."""

    token_logprob: TokenLogprob
    finish_reason: str | None = None
    """"stop" or "length" with the last event."""


class RequestFailed(NamedTuple):
    """The request has failed; this is its last event."""

    error: Exception


RequestEvent = PrefillDone | NewToken | RequestFailed


@dataclass
class StepPlan:
    """Changes to apply before a step; all ranks of a launch apply the same."""

    submit: list[Request] = field(default_factory=list)
    cancel: list[int] = field(default_factory=list)
    """Ids of the requests to give up."""
    flush: bool = False
    """Empty the prefix cache."""
    stop: bool = False
    """End the loop instead of stepping."""
    prefill_rate: float = 0
    """Rank 0's estimate of prompt tokens a second; chunks must be alike on all ranks."""

    def to_bytes(self) -> bytes:
        """Serialize for the other ranks; of a request only what their passes depend on."""
        requests = [{name: getattr(r, name) for name in _SHARED_FIELDS} for r in self.submit]
        fields = [requests, self.cancel, self.flush, self.stop, self.prefill_rate]
        return json.dumps(fields, default=list).encode()  # a list for the frozenset `eos`

    @classmethod
    def from_bytes(cls, data: bytes) -> StepPlan:
        requests, *rest = json.loads(data)
        return cls([Request(**{**r, "eos": frozenset(r["eos"])}) for r in requests], *rest)


_SHARED_FIELDS = ("request_id", "prompt", "max_tokens", "adapter", "eos", "logprob_start", "embed")
"""Rank 0 alone draws tokens, so the other ranks need neither sampling nor grammar."""
