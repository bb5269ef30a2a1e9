"""What the scheduler is asked, and what it tells."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from ..grammar import Grammar
from ..logprobs import Scored
from ..sampling import Sampling


@dataclass(kw_only=True, eq=False)
class Request:
    """One text to be read, and continued where `max_tokens` is not 0."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str | None = None
    """Name of the model that reads it; None is the one without adapter."""
    eos: frozenset[int] = frozenset()
    """Tokens that end it."""
    min_tokens: int = 0
    """Tokens before one of `eos` may come."""
    grammar: Grammar | None = None
    top: int | None = None
    """With each token its log probability, and this many of the likeliest."""
    score_from: int | None = None
    """Log probabilities of the prompt's tokens from this position on."""
    pooled: bool = False
    """The mean of the last hidden states is wanted, and nothing else."""
    deadline: float | None = None
    """When it is given up, by time.monotonic()."""
    number: int = field(default_factory=count().__next__)
    """By which it is known, also to other ranks."""

    @property
    def size(self) -> int:
        """Positions that it may take."""
        return len(self.prompt) + self.max_tokens

    @property
    def reusable(self) -> int:
        """Tokens of the prompt that need not be read where they are known: more matters of those
        that are scored, or whose hidden states count."""
        if self.pooled:
            return 0
        most = len(self.prompt) - (self.max_tokens > 0)
        return most if self.score_from is None else max(min(self.score_from - 1, most), 0)


class Read(NamedTuple):
    """The prompt has been read."""

    cached: int
    """Tokens of it that were known already."""
    scored: tuple[Scored, ...] = ()
    """The prompt's tokens from `score_from` on."""
    pooled: tuple[float, ...] = ()
    """The mean of the last hidden states (hidden)."""
    last: bool = False
    """Nothing follows."""


class Token(NamedTuple):
    """A token of the reply."""

    scored: Scored
    reason: str | None = None
    """"stop" or "length": nothing follows."""


class Failed(NamedTuple):
    """It came to nothing; nothing follows."""

    error: Exception


Event = Read | Token | Failed


@dataclass
class StepPlan:
    """Taken in before a turn."""

    submit: list[Request] = field(default_factory=list)
    cancel: list[int] = field(default_factory=list)
    """Numbers of requests to give up."""
    flush: bool = False
    """Forget what was read before."""
    end: bool = False
    """There is no turn any more."""
    rate: float = 0
    """Tokens of prompts that are read in a second, about."""

    def to_bytes(self) -> bytes:
        """For other ranks: of a request only what they need to compute with the first."""
        requests = [
            (r.number, [*r.prompt], r.max_tokens, r.adapter, [*r.eos], r.score_from, r.pooled)
            for r in self.submit
        ]
        return json.dumps([requests, self.cancel, self.flush, self.end, self.rate]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> StepPlan:
        requests, *rest = json.loads(data)
        return cls([_request(*fields) for fields in requests], *rest)


def _request(
    number: int,
    prompt: Sequence[int],
    max_tokens: int,
    adapter: str | None,
    eos: Sequence[int],
    score_from: int | None,
    pooled: bool,
) -> Request:
    return Request(
        number=number,
        prompt=prompt,
        max_tokens=max_tokens,
        adapter=adapter,
        eos=frozenset(eos),
        score_from=score_from,
        pooled=pooled,
    )
