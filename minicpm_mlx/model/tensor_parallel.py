"""Tensor parallelism: each process computes some heads and some of the feed-forward.

After Shoeybi et al., arXiv 1909.08053: results are summed over the processes after attention and
after the feed-forward; embedding, norms and head are the same on all.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..distributed import collectives
from ..errors import InvalidArgumentError
from .attention import Attention
from .config import Config
from .feed_forward import MLP
from .fused import FusedModel
from .transformer import Model


class AllReduce(nn.Module):
    """Attention or feed-forward of which each process computes a share of the sum."""

    def __init__(self, part: nn.Module):
        super().__init__()
        self.part = part

    def __call__(self, *arguments: Any) -> mx.array:
        return mx.distributed.all_sum(self.part(*arguments), group=collectives.group())


def shard(model: Model) -> None:
    """Reduce `model`, whose arrays may be lazy, to this process's share of it.

    Call `add_all_reduce` next, after `fuse` if that is wanted. InvalidArgumentError if the model
    cannot be divided by the number of processes.
    """
    rank, size = collectives.rank(), collectives.size()
    _check(model.config, size)
    for block in model.layers:
        attention: Any = block.self_attn
        attention.heads //= size
        if isinstance(attention, Attention):
            attention.kv_heads //= size
            divided = [attention.q_proj, attention.k_proj, attention.v_proj]
        else:
            divided = [attention.q_b_proj, attention.kv_b_proj]
        for layer in divided:
            _keep_outputs(layer, rank, size)
        _keep_inputs(attention.o_proj, rank, size)
        mlp: Any = block.mlp
        parts = (
            [(mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
            if isinstance(mlp, MLP)
            else [(expert.w1, expert.w3, expert.w2) for expert in mlp.experts]
        )
        for gate, up, down in parts:
            _keep_outputs(gate, rank, size)
            _keep_outputs(up, rank, size)
            _keep_inputs(down, rank, size)


def add_all_reduce(model: Model | FusedModel) -> None:
    """Make the layers of a sharded model sum their results over the processes."""
    for block in model.layers:
        layer: Any = block
        layer.self_attn, layer.mlp = AllReduce(block.self_attn), AllReduce(block.mlp)


def _check(config: Config, size: int) -> None:
    groups = 1 if config.quantization is None else config.quantization.group_size
    for name, count, unit in (
        ("attention heads", config.num_attention_heads, 1),
        ("key-value heads", config.num_key_value_heads, 1),
        ("feed-forward columns", config.intermediate_size, groups),
        ("attention columns", config.num_attention_heads * config.value_dim, groups),
    ):
        if count % (size * unit):
            together = f" in groups of {unit}" if unit > 1 else ""
            raise InvalidArgumentError(
                f"launch: this model's {count} {name}{together} cannot be divided among {size} "
                "processes; take another number of them"
            )


def _keep_outputs(layer: Any, rank: int, size: int) -> None:
    for name in layer:  # rows of the weight, and of all that goes with it
        layer[name] = mx.split(layer[name], size, axis=0)[rank]


def _keep_inputs(layer: Any, rank: int, size: int) -> None:
    for name in layer:
        if name != "bias":
            layer[name] = mx.split(layer[name], size, axis=-1)[rank]
        elif rank:  # added once
            layer[name] = mx.zeros_like(layer[name])
