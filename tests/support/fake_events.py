"""What a training run would tell, without one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from minicpm_mlx.train.tracking.events import Trained


def trained(step: int, loss: float = 1.5, **changes: Any) -> Trained:
    """Step `step` of a run of ten to an epoch."""
    rates = {"learning_rate": 1e-4, "gradient_norm": 0.5, "tokens_per_second": 312.0}
    counts = {"tokens": 100 * step, "epoch": step / 10, "peak_memory": 2_500_000_000}
    usual = Trained(step=step, loss=loss, **rates, **counts)
    return replace(usual, **changes)
