"""Speculative decoding: drafts of the next tokens, verified in one forward pass.

Drafts never change the text. Every token is drawn from the model's own logits; a draft token that
equals it has saved a pass. So greedy text, and sampled text with the same seed, is the same with
and without drafts, except for rounding: a pass over several tokens may sum in another order than a
pass over one, and tip a tie.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

MAX_DRAFT_TOKENS = 16
"""Draft tokens a pass."""

MAX_MATCH = 8
"""Matching tokens beyond which a longer match is no more likely to continue alike."""

PRIOR_ACCEPTANCE = {2: 0.4, 3: 0.65}
"""Share of draft tokens accepted, until it is measured, by length of the match; else 0.8."""

MAX_CANDIDATES = 16
"""Latest occurrences of a pair of tokens that are compared."""


class Drafter(Protocol):
    """Proposes the next tokens of a text."""

    def confidence(self, text: Sequence[int]) -> int:
        """Return a class whose acceptance is measured on its own; 0: there is no draft."""
        ...

    def propose(self, text: Sequence[int], count: int) -> list[int]:
        """Return up to `count` tokens that may follow, after `confidence` of the same text."""
        ...


class PromptLookup:
    """Proposes what followed the last few tokens where they occurred before (n-gram lookup)."""

    def __init__(self) -> None:
        self.ends: dict[tuple[int, int], list[int]] = {}
        """Positions after each pair of tokens that another token follows."""
        self.indexed = 1
        self.match_end = 0

    def confidence(self, text: Sequence[int]) -> int:
        """Return how many of the last tokens occurred before, from 2 up to MAX_MATCH; else 0."""
        for end in range(self.indexed + 1, len(text)):
            self.ends.setdefault((text[end - 2], text[end - 1]), []).append(end)
        self.indexed = max(self.indexed, len(text) - 1)
        best = 0
        candidates = self.ends.get((text[-2], text[-1]), []) if len(text) > 1 else []
        for end in reversed(candidates[-MAX_CANDIDATES:]):
            length = 2
            while length < min(MAX_MATCH, end) and text[end - 1 - length] == text[-1 - length]:
                length += 1
            if length > best:
                best, self.match_end = length, end
        return best

    def propose(self, text: Sequence[int], count: int) -> list[int]:
        draft: list[int] = []
        for position in range(self.match_end, self.match_end + count):
            # A match near the end runs into the draft itself: the text repeats itself.
            inside = position < len(text)
            draft.append(text[position] if inside else draft[position - len(text)])
        return draft


class Speculation:
    """Chooses how many tokens to draft, from measured acceptance and cost; none without a drafter.

    Times are in seconds, as passes take them. They decide the speed, never the text.
    """

    def __init__(self, drafter: Drafter | None):
        self.drafter = drafter
        self.passes = 0
        """Forward passes after the prompt's."""
        self.slope = 0.1
        """Average cost of a draft token, as a share of a plain step."""
        self.shape = [float(count) for count in range(1, MAX_DRAFT_TOKENS + 1)]
        """Cost of 1, 2, ... draft tokens, as multiples of the average one's."""
        self.step_seconds: float | None = None
        """A plain step's."""
        self.acceptance: dict[int, float] = {}
        """Share of draft tokens accepted, by class of confidence."""
        self.confidence = 0
        self.draft_seconds = 0.0

    def use_costs(self, costs: Sequence[float]) -> None:
        """Begin with the measured costs of 1, 2, ... MAX_DRAFT_TOKENS draft tokens, as shares of a
        plain step."""
        self.slope = costs[-1] / MAX_DRAFT_TOKENS
        self.shape = [cost / self.slope for cost in costs]

    def draft_tokens(self, text: Sequence[int], limit: int) -> list[int]:
        """Return the tokens worth verifying next; none where a plain step is faster."""
        if self.drafter is None:
            return []
        start = time.perf_counter()
        self.confidence = self.drafter.confidence(text)
        count = min(self._best_count(), limit) if self.confidence else 0
        tokens = self.drafter.propose(text, count) if count > 0 else []
        self.draft_seconds = time.perf_counter() - start
        return tokens

    def _acceptance(self) -> float:
        return self.acceptance.get(self.confidence, PRIOR_ACCEPTANCE.get(self.confidence, 0.8))

    def _best_count(self) -> int:
        """Return the number of draft tokens that gives most tokens a second."""
        acceptance, best_rate, best_count = self._acceptance(), 1.0, 0
        tokens = 1.0  # expected; the nth draft token counts only if all before it are accepted
        for count in range(1, MAX_DRAFT_TOKENS + 1):
            tokens += acceptance**count
            rate = tokens / (1 + self.slope * self.shape[count - 1])
            if rate > best_rate * 1.02:  # less is noise, and a longer draft costs more when wrong
                best_rate, best_count = rate, count
        return best_count

    def record_verified(self, drafted: int, accepted: int, seconds: float) -> None:
        """Learn from a pass that verified `drafted` tokens, the first `accepted` of them right."""
        self.passes += 1
        acceptance = self._acceptance()
        # Tokens after the first wrong one say nothing about the share.
        for was_accepted in [True] * accepted + [False] * (accepted < drafted):
            acceptance += 0.15 * (was_accepted - acceptance)
        self.acceptance[self.confidence] = acceptance
        if self.step_seconds:
            extra = (seconds + self.draft_seconds) / self.step_seconds - 1
            slope = extra / self.shape[min(drafted, MAX_DRAFT_TOKENS) - 1]
            self.slope += 0.2 * (min(max(slope, 0.01), 1.0) - self.slope)

    def record_step(self, seconds: float) -> None:
        """Learn from a plain step, which ran while the one before it was waited for."""
        if self.step_seconds is None:
            self.step_seconds = seconds
        self.step_seconds += 0.1 * (seconds - self.step_seconds)
        # Back towards the prior, slowly: a class that did not pay is tried again now and then.
        for confidence, acceptance in self.acceptance.items():
            prior = PRIOR_ACCEPTANCE.get(confidence, 0.8)
            self.acceptance[confidence] = acceptance + 0.002 * (prior - acceptance)
