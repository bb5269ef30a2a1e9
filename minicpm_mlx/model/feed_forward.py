"""The gated feed-forward layer, and the mixture of experts.

In a mixture each token goes through the few experts that its router scores highest.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn

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


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.activation = Activation(config)
        self.residual_scale = config.residual_scale
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        # Scaled before down_proj rather than after: its raw output overflows float16.
        inner = self.activation(self.gate_proj(x), self.up_proj(x)) * self.residual_scale
        return self.down_proj(inner)


def route(scores: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Choose `k` experts from router scores (..., E); return indices and weights, both (..., k).

    Softmax over all experts in float32; the chosen weights are normalized to sum to 1.
    """
    weights = mx.softmax(scores.astype(mx.float32), axis=-1)
    chosen = mx.stop_gradient(mx.argpartition(-weights, kth=k - 1, axis=-1)[..., :k])
    weights = mx.take_along_axis(weights, chosen, axis=-1)
    return chosen, weights / weights.sum(axis=-1, keepdims=True)


class Expert(nn.Module):
    """One gated feed-forward layer, under the checkpoint's names."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.w1 = nn.Linear(hidden, intermediate, bias=False)
        self.w2 = nn.Linear(intermediate, hidden, bias=False)
        self.w3 = nn.Linear(hidden, intermediate, bias=False)


class MoE(nn.Module):
    """The reference mixture: every expert sees every token, and most results are weighted by 0."""

    def __init__(self, config: Config):
        super().__init__()
        self.k = config.num_experts_per_tok
        self.residual_scale = config.residual_scale
        self.activation = Activation(config)
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = [
            Expert(config.hidden_size, config.intermediate_size) for _ in range(config.num_experts)
        ]

    def __call__(self, x: mx.array) -> mx.array:
        chosen, weights = route(self.gate(x), self.k)  # (B, T, k)
        total = mx.zeros_like(x)
        for index, expert in enumerate(self.experts):
            share = mx.where(chosen == index, weights, 0).sum(axis=-1, keepdims=True)  # (B, T, 1)
            inner = self.activation(expert.w1(x), expert.w3(x)) * self.residual_scale
            total = total + expert.w2(inner) * share.astype(x.dtype)
        return total
