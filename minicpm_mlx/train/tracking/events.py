"""What a run says of itself as it goes on; who listens may print it, log it or draw it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Started:
    """Before the first step, or the first after resuming."""

    step: int
    """Steps already done: 0, or where the run was resumed."""
    steps: int
    """Steps in all."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """After some optimizer steps."""

    step: int
    """Steps done."""
    loss: float
    """Mean over the tokens (or pairs) since the last such event."""
    learning_rate: float
    gradient_norm: float
    """Before clipping, of the last step."""
    tokens: int
    """Read since the run began, padding not counted."""
    tokens_per_second: float
    """Since the last such event."""
    epoch: float
    """Passes over the data, such as 1.5."""
    peak_memory: int
    """Most bytes MLX has held since the run began."""
    extra: dict[str, float] = field(default_factory=dict)
    """Of preferences, such as reward margin and accuracy."""


@dataclass(frozen=True, kw_only=True)
class Validated:
    """After measuring on the validation set."""

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
    """What the model replies to a validation prompt, before and after training."""

    step: int
    prompt: str
    reply: str


@dataclass(frozen=True, kw_only=True)
class Noted:
    """Something a person should know: a step skipped for NaN, a rollback, an early stop."""

    step: int
    text: str


Event = Started | Trained | Validated | Saved | Sampled | Noted
Listener = Callable[[Event], object]
