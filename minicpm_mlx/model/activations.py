"""The gated activations of the family."""

from __future__ import annotations

from functools import partial

import mlx.core as mx

from . import kernels
from .config import Config


class Activation:
    """act(gate) * up, for silu and for S-1B's fatrelu (0 at or below a threshold)."""

    def __init__(self, config: Config):
        self.threshold = config.hidden_act_param if config.hidden_act == "fatrelu" else None

    def __call__(self, gate: mx.array, up: mx.array) -> mx.array:
        if self.threshold is None:
            return kernels.mlx_silu_mul(gate, up)
        return _fatrelu_mul(gate, up, mx.array(self.threshold, gate.dtype))

    def for_inference(self) -> kernels.GatedActivation:
        """Return the fastest form; it may have no gradient."""
        return kernels.silu_mul() if self.threshold is None else self


@partial(mx.compile, shapeless=True)
def _fatrelu_mul(gate: mx.array, up: mx.array, threshold: mx.array) -> mx.array:
    return mx.where(gate > threshold, gate, 0) * up
