"""The gated activations of the family."""

from __future__ import annotations

import mlx.core as mx

from .config import Config


class Activation:
    """act(gate) * up, for silu and for S-1B's fatrelu (0 at or below a threshold)."""

    def __init__(self, config: Config):
        self.threshold = config.hidden_act_param if config.hidden_act == "fatrelu" else None

    def __call__(self, gate: mx.array, up: mx.array) -> mx.array:
        if self.threshold is None:
            return gate * mx.sigmoid(gate) * up
        return mx.where(gate > self.threshold, gate, 0) * up
