"""Guesses at the next tokens, checked many at a time in one forward pass.

A guess never changes what is drawn: every token is drawn from the model's own logits, and a guess
that it equals has saved a pass. So greedy text is the same with guesses and without, and so is
sampled text with the same seed; but for rounding, since a pass over several tokens may sum in
another order than one over one, and tip a tie.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

MOST = 16
"""Guesses a pass."""

SURE = 8
"""Tokens that were there before, from which on more of them make a guess no surer."""

PRIOR = {2: 0.4, 3: 0.65}
"""Share of guesses that come true, until it is known, by how many tokens were there before; else
0.8."""

RECENT = 16
"""Places where a pair was seen last that are looked at."""


class Drafter(Protocol):
    """Guesses what follows a text."""

    def find(self, text: Sequence[int]) -> int:
        """How sure a guess would be, as a class of its own: 0 where there is none to make."""
        ...

    def guess(self, text: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that may follow."""
        ...


class Lookup:
    """Guesses that what followed the last few tokens before follows them again."""

    def __init__(self) -> None:
        self.ends: dict[tuple[int, int], list[int]] = {}
        """Where each pair of tokens ended that something followed."""
        self.known = 1
        self.found = 0

    def find(self, text: Sequence[int]) -> int:
        """How many tokens before the end were there before, from 2 up to SURE."""
        for end in range(self.known + 1, len(text)):
            self.ends.setdefault((text[end - 2], text[end - 1]), []).append(end)
        self.known = max(self.known, len(text) - 1)
        best = 0
        for end in reversed(self.ends.get(tuple(text[-2:]), [])[-RECENT:]):  # type: ignore[arg-type]
            alike = 2
            while alike < min(SURE, end) and text[end - 1 - alike] == text[-1 - alike]:
                alike += 1
            if alike > best:
                best, self.found = alike, end
        return best

    def guess(self, text: Sequence[int], count: int) -> list[int]:
        made: list[int] = []
        for at in range(self.found, self.found + count):  # a text that repeats itself goes on so
            made.append(text[at] if at < len(text) else made[at - len(text)])
        return made


class Speculation:
    """Decides how many guesses are worth a pass, from how often they came true and what they cost;
    none without a drafter.

    Costs are measured as it goes, in seconds; they decide the speed, never the text.
    """

    def __init__(self, drafter: Drafter | None):
        self.drafter = drafter
        self.passes = 0
        """Forward passes after the prompt's."""
        self.slope = 0.1
        """What a guess adds to a pass, as a share of a plain one."""
        self.plain: float | None = None
        """Seconds of a plain pass."""
        self.hits: dict[int, float] = {}
        """Share of guesses that came true, of each class of `Drafter.find`."""
        self.kind = 0
        self.spent = 0.0  # seconds, on making the guesses

    def guesses(self, text: Sequence[int], most: int) -> list[int]:
        """The guesses worth checking next, none where a plain pass is quicker."""
        if self.drafter is None:
            return []
        start = time.perf_counter()
        self.kind = self.drafter.find(text)
        count = min(self._worth(), most) if self.kind else 0
        made = self.drafter.guess(text, count) if count > 0 else []
        self.spent = time.perf_counter() - start
        return made

    def _worth(self) -> int:
        """The number of guesses that gives most tokens a second."""
        hit, best, length = self.hits.get(self.kind, PRIOR.get(self.kind, 0.8)), 1.0, 0
        tokens = 1.0
        for count in range(1, MOST + 1):
            tokens += hit**count
            rate = tokens / (1 + self.slope * count)
            if rate > best * 1.02:
                best, length = rate, count
        return length

    def checked(self, guessed: int, right: int, seconds: float) -> None:
        """Learn from a pass over guesses, so many of them right."""
        self.passes += 1
        hit = self.hits.get(self.kind, PRIOR.get(self.kind, 0.8))
        for came_true in [True] * right + [False] * (right < guessed):
            hit += 0.15 * (came_true - hit)
        self.hits[self.kind] = hit
        if self.plain:
            slope = ((seconds + self.spent) / self.plain - 1) / guessed
            self.slope += 0.2 * (min(max(slope, 0.01), 1.0) - self.slope)

    def stepped(self, seconds: float) -> None:
        """Learn from a plain pass, made while the one before it was waited for."""
        self.plain = seconds if self.plain is None else self.plain + 0.1 * (seconds - self.plain)
        for kind, hit in self.hits.items():  # what did not pay is tried again, if seldom
            self.hits[kind] = hit + 0.002 * (PRIOR.get(kind, 0.8) - hit)
