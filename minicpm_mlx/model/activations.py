"""The gated activations of the family."""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from .config import Config


class Activation:
    """act(gate) * up, for silu and for S-1B's fatrelu (0 at or below a threshold)."""

    def __init__(self, config: Config):
        self.threshold = config.hidden_act_param if config.hidden_act == "fatrelu" else None

    def __call__(self, gate: mx.array, up: mx.array) -> mx.array:
        if self.threshold is None:
            return _silu(gate, up)
        return _relu(gate, up, mx.array(self.threshold, gate.dtype))


@partial(mx.compile, shapeless=True)  # one kernel instead of three
def _silu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


@partial(mx.compile, shapeless=True)
def _relu(gate: mx.array, up: mx.array, threshold: mx.array) -> mx.array:
    return mx.where(gate > threshold, gate, 0) * up
