"""AWQ: scales up columns that see large inputs before rounding, and clips weights.

Lin et al., arXiv 2306.00978. The search is mlx-lm's; this module describes the architecture to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..model.config_sections import Quantization
from ..model.feed_forward import MLP
from ..model.mla import LatentAttention
from ..model.modules import at, replace_module
from ..model.transformer import Block
from .layerwise import LayerRun, matrices

GRID = 20
"""Number of scales to try."""

UNCLIPPED = ["q_proj", "k_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
"""Their outputs are multiplied with each other, so clipping them harms."""


class InputRecorder(nn.Module):
    """A projection that records its inputs."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.seen: list[mx.array] = []

    def __call__(self, x: mx.array) -> mx.array:
        self.seen.append(x)
        return self.layer(x)


def rescale(
    block: Block, plan: Mapping[str, Quantization], run: LayerRun, xs: list[mx.array]
) -> None:
    """Change the matrices and norms of `block` so that rounding to nearest costs less.

    Its output for the inputs `xs` stays the same, except for clipped weights. Matrices that are
    not in `plan` stay dense: nothing is searched for them.
    """
    import mlx_lm.quant.awq as theirs

    if not plan:
        return
    packing = next(iter(plan.values()))

    def rounded(weight: mx.array) -> mx.array:
        options: Any = {"group_size": packing.group_size, "bits": packing.bits}
        return mx.dequantize(*mx.quantize(weight, **options), **options)

    _record_inputs(block, list(plan), run, xs)
    attention = {"rotate": run.rotate, "mask": run.mask, "cache": None}
    config: Any = theirs.ScaleConfig  # annotated with modules, but used with paths
    latent = isinstance(block.self_attn, LatentAttention)
    inputs = ["q_a_proj", "kv_a_proj_with_mqa"] if latent else ["q_proj", "k_proj", "v_proj"]
    scaled = [
        config(block="self_attn", prev="input_layernorm", layers=inputs, kwargs=list(attention))
    ]
    if latent:
        scaled += [
            config(prev=f"self_attn.{name}_a_layernorm", layers=[f"self_attn.{name}_b_proj"])
            for name in ("q", "kv")
        ]
    if isinstance(block.mlp, MLP):
        scaled += [
            config(prev="mlp.up_proj", layers=["mlp.down_proj"]),
            config(block="mlp", prev="post_attention_layernorm", layers=["gate_proj", "up_proj"]),
        ]
    # All matrices of one input have its width, so that one stands for them.
    scaled = [c for c in scaled if ".".join(filter(None, (c.block, c.layers[0]))) in plan]
    theirs.scale_block(block, scaled, rounded, attention, GRID)
    router = [] if isinstance(block.mlp, MLP) else ["mlp.gate"]
    dense = [name for name in matrices(block) if name not in plan]
    theirs.clip_block(block, UNCLIPPED + router + dense, rounded, packing.group_size)
    for name in plan:
        del at(block, name)["input_feat"]


def _record_inputs(block: Block, names: list[str], run: LayerRun, xs: list[mx.array]) -> None:
    """Store each matrix's inputs under the name that mlx-lm's search looks for."""
    recorders = {name: InputRecorder(at(block, name)) for name in names}
    for name, recorder in recorders.items():
        replace_module(block, name, recorder)
    for x in xs:
        mx.eval(run(block, x))
    for name, recorder in recorders.items():
        recorder.layer.input_feat = mx.concatenate(recorder.seen)  # (texts, T, in)
        replace_module(block, name, recorder.layer)
