"""What a scheduler does in a turn besides going on; several ranks follow the first one's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from .batching.requests import Request


@dataclass
class Plan:
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
    def from_bytes(cls, data: bytes) -> Plan:
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
