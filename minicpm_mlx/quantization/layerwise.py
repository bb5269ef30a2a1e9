"""Runs a checkpoint's model layer by layer in float32, with only one layer in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from ..model.attention import Mask
from ..model.config_sections import Quantization
from ..model.rope import Rope, Rotation
from ..model.transformer import Block, prepare_pass
from ..weights.checkpoint import Checkpoint
from ..weights.lazy_ops import packed_parts, unpacked
from ..weights.lazy_tensor import LazyTensor
from ..weights.load import parameters

ROWS = 256
"""Positions whose logits are in memory at a time."""


@dataclass(frozen=True)
class LayerRun:
    """Runs blocks on texts of one length."""

    rotate: Rotation
    mask: Mask

    def __call__(self, block: Block, x: mx.array) -> mx.array:
        """The block's output for its input (1, T, hidden)."""
        return block(x, self.rotate, self.mask, None)


class LayerReader:
    """Reads the parts of one model; each call reads its part anew."""

    def __init__(self, checkpoint: Checkpoint):
        self.config = checkpoint.config
        self.tensors = checkpoint.tensors
        self.rope = Rope(self.config)
        self.packings = checkpoint.packings

    def __getitem__(self, name: str) -> mx.array:
        """The parameter `name`, unpacked where it is packed."""
        return dense(name, self.tensors, self.packings)

    def layer(self, number: int) -> Block:
        block = Block(self.config)
        prefix = f"model.layers.{number}."
        block.load_weights([(name, self[prefix + name]) for name in parameters(block)])
        mx.eval(block.parameters())
        return block

    @property
    def head_name(self) -> str:
        """Name of the head's matrix (V, hidden): the embedding, if it is tied."""
        tied = self.config.tie_word_embeddings
        return "model.embed_tokens.weight" if tied else "lm_head.weight"

    def start(self, texts: Sequence[Sequence[int]]) -> list[mx.array]:
        """The first block's input for each text, (1, T, hidden); texts have one length."""
        rows = self._rows(mx.array([list(text) for text in texts])) * self.config.scale_emb
        xs = list(mx.split(rows, len(texts)))
        mx.eval(xs)
        return xs

    def _rows(self, ids: mx.array) -> mx.array:
        """The embedding's rows for `ids`, without unpacking the others."""
        name = "model.embed_tokens"
        tensors = {k: v for k, v in self.tensors.items() if k.startswith(f"{name}.")}
        rows = {
            k: LazyTensor(v.shape, v.dtype, partial(_rows_of, v, ids)) for k, v in tensors.items()
        }
        return dense(f"{name}.weight", rows, self.packings)

    def runner(self, length: int) -> LayerRun:
        ids = mx.zeros((1, length), mx.int32)
        rotate, mask, _ = prepare_pass(self.rope, ids, None, self.config.num_hidden_layers, None)
        return LayerRun(rotate, mask)

    def finish(self, x: mx.array) -> mx.array:
        """The head's input for the last block's output `x`."""
        weight, eps = self["model.norm.weight"], self.config.rms_norm_eps
        return mx.fast.rms_norm(x, weight, eps) / self.config.logit_divisor


def _rows_of(tensor: LazyTensor, ids: mx.array) -> mx.array:
    return tensor.load()[ids]


def matrices(block: Block) -> list[str]:
    """Paths of the matrices inside a block, except a router, which is never packed."""
    return [
        name
        for name, module in block.named_modules()
        if type(module) is nn.Linear and name != "mlp.gate"
    ]


def products(x: mx.array) -> mx.array:
    """The sum of x xT over all rows of x (..., width)."""
    rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
    return rows.T @ rows


def dense(
    name: str, tensors: Mapping[str, LazyTensor], packings: Mapping[str, Quantization]
) -> mx.array:
    """The parameter `name` of `tensors` in float32, unpacked if it is packed."""
    module, _, kind = name.rpartition(".")
    packing = packings.get(module)
    if packing is None or kind != "weight":
        return tensors[name].load().astype(mx.float32)
    return unpacked(packed_parts(tensors, module), packing).load()
