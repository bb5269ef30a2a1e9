"""Events that a run emits, for listeners that print, log or plot them.

The names of these classes, in lower case, are the kinds of events in log.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Started:
    """Before the first step of a new or resumed run."""

    step: int
    """Steps already done; more than 0 in a resumed run."""
    steps: int
    """Steps of the whole run."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """After every few optimizer steps."""

    step: int
    """Steps done."""
    loss: float
    """Mean over the tokens (or pairs) since the last event of this kind."""
    learning_rate: float
    gradient_norm: float
    """Before clipping, of the last step."""
    tokens: int
    """Tokens read since the run began, without padding."""
    tokens_per_second: float
    """Since the last event of this kind."""
    epoch: float
    """Fractional number of passes over the data."""
    peak_memory: int
    """In bytes, since the run began."""
    extra: dict[str, float] = field(default_factory=dict)
    """Further metrics, such as margin and accuracy of preferences."""


@dataclass(frozen=True, kw_only=True)
class Validated:
    """After an evaluation on the validation set."""

    step: int
    loss: float
    best: bool
    """Whether it is the lowest so far."""
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint was written."""

    step: int
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The reply to a validation prompt, before or after training."""

    step: int
    prompt: str
    reply: str


@dataclass(frozen=True, kw_only=True)
class Noted:
    """A message for the user: a skipped step, a rollback, an early stop."""

    step: int
    text: str


Event = Started | Trained | Validated | Saved | Sampled | Noted
Listener = Callable[[Event], object]
