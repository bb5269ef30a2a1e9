"""What is made small: the cross-entropy of the tokens that count, or a loss over preferences.

An objective gives sums over some samples, and how much the samples weigh, so that a batch may be
cut up, over time or over processes, without changing the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
from mlx.utils import tree_flatten

from ..model import Block, Mask, Model, prepare
from ..rope import Rotation
from .batches import Batch, batch_of, sequences
from .head import token_losses
from .samples import Item

Sums = dict[str, mx.array]
"""The loss, under "loss", and whatever else is told of, summed."""


class Objective(Protocol):
    """See the module's text."""

    @property
    def told(self) -> tuple[str, ...]:
        """Names of the sums."""

    def batch(self, items: Sequence[Item]) -> Batch:
        """Samples as the arrays that `sums` needs."""

    def weight(self, items: Sequence[Item]) -> float:
        """By which their sums are to be divided, together with those of others."""

    def sums(self, model: Model, batch: Batch, checkpointing: bool) -> Sums:
        """Of the samples in `batch`; differentiable with respect to the model's parameters."""


class CrossEntropy:
    """The mean over all tokens that count, in nats: every token of an epoch weighs the same."""

    told = ("loss",)

    def batch(self, items: Sequence[Item]) -> Batch:
        return batch_of(sequences(items))

    def weight(self, items: Sequence[Item]) -> float:
        return sum(sample.targets for sample in sequences(items))

    def sums(self, model: Model, batch: Batch, checkpointing: bool) -> Sums:
        return {"loss": (losses(model, batch, checkpointing) * batch.weights).sum()}


def losses(
    model: Model, batch: Batch, checkpointing: bool = False, *, gradients: bool | None = None
) -> mx.array:
    """The cross-entropy of each token of `batch` that counts: (N,), in nats.

    By default it can be differentiated if the model is in training.
    """
    gradients = model.training if gradients is None else gradients
    hidden = hidden_states(model, batch.ids, checkpointing)
    hidden = hidden.reshape(-1, hidden.shape[-1])[batch.places]
    return token_losses(model, hidden, batch.targets, gradients=gradients)


def hidden_states(model: Model, ids: mx.array, checkpointing: bool = False) -> mx.array:
    """As Model.hidden, of ids (B, T); with `checkpointing` a layer keeps its input alone, and is
    computed again for its gradient."""
    if not checkpointing:
        return model.hidden(ids)
    decoder = model.model
    x = decoder.embed_tokens(ids) * decoder.scale_emb
    rotate, mask, _ = prepare(decoder.rope, ids, None, len(decoder.layers), None)
    for layer in decoder.layers:
        x = _block(layer, x, rotate, mask)
    return decoder.norm(x)


def _block(layer: Block, x: mx.array, rotate: Rotation, mask: Mask) -> mx.array:
    def run(parameters: dict[str, Any], x: mx.array) -> mx.array:
        layer.update(parameters)
        return layer(x, rotate, mask, None)

    trained = layer.trainable_parameters()
    if not tree_flatten(trained):  # nor is anything below: it keeps nothing as it is
        return layer(x, rotate, mask, None)
    return mx.checkpoint(run)(trained, x)
