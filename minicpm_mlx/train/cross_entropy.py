"""Cross-entropy over a large vocabulary, in chunks of tokens, so that not all logits are held.

The gradient with respect to a token's hidden state needs the same probabilities as its loss, so
both are computed together and logits are computed once. If the head is trained too, which most runs
do not do, logits are computed again for its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..model.packing import packing_options
from ..model.transformer import Model
from . import cpu_kernels

CHUNK = 1 << 24
"""Logits held at once: 64 MB in float32."""

MatMul = Callable[[mx.array], mx.array]


def token_losses(
    model: Model,
    hidden: mx.array,
    targets: mx.array,
    *,
    gradients: bool = True,
    eager: bool = False,
) -> mx.array:
    """Cross-entropy of `targets` (N,) given hidden states (N, hidden): (N,), float32, in nats.

    Without `gradients` it is faster but not differentiable. `eager` lets a CPU compute each chunk
    at once, which is faster there; not within another transformation of MLX.
    """
    config = model.config
    head = model.model.embed_tokens if config.tie_word_embeddings else model.lm_head
    hidden = hidden / config.logit_divisor
    chunks = _Chunks(targets, max(CHUNK // config.vocab_size, 1), eager)
    if not gradients:
        return chunks.losses(_head_matmuls(head)[0], hidden)
    if "weight" in head.trainable_parameters():
        return _losses_with_trained_head(hidden, head.weight, chunks)
    return _losses_with_frozen_head(hidden, head, chunks)


def _losses_with_frozen_head(hidden: mx.array, head: nn.Module, chunks: _Chunks) -> mx.array:
    to_logits, to_hidden = _head_matmuls(head)

    @mx.custom_function
    def forward(hidden: mx.array) -> tuple[mx.array, mx.array]:
        losses: list[mx.array] = []
        gradients: list[mx.array] = []
        for states, targets in chunks.of(hidden, losses, gradients):
            loss, gradient = chunks.loss_and_gradient(to_logits(states), targets)
            losses.append(chunks.detach(loss))
            gradients.append(chunks.detach(to_hidden(gradient.astype(hidden.dtype))))
        return mx.concatenate(losses), mx.concatenate(gradients)

    @forward.vjp
    def backward(
        _: mx.array, above: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]
    ) -> mx.array:
        gradients = outputs[1]
        return above[0][:, None].astype(gradients.dtype) * gradients

    outputs: Any = forward(hidden)
    return outputs[0]


def _losses_with_trained_head(hidden: mx.array, weight: mx.array, chunks: _Chunks) -> mx.array:
    @mx.custom_function
    def forward(hidden: mx.array, weight: mx.array) -> mx.array:
        return chunks.losses(lambda x: x @ weight.T, hidden)

    @forward.vjp
    def backward(inputs: list[mx.array], above: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        hidden, weight = inputs
        to_hidden: list[mx.array] = []
        to_weight = [mx.zeros(weight.shape, mx.float32)]
        start = 0
        for states, targets in chunks.of(hidden, to_hidden, to_weight):
            _, gradient = chunks.loss_and_gradient(states @ weight.T, targets)
            gradient = gradient * above[start : start + len(targets), None]
            gradient = gradient.astype(weight.dtype)
            to_hidden.append(chunks.detach(gradient @ weight))
            to_weight[0] = chunks.detach(to_weight[0] + gradient.T @ states)
            start += len(targets)
        return mx.concatenate(to_hidden), to_weight[0].astype(weight.dtype)

    losses: Any = forward(hidden, weight)
    return losses


@dataclass(frozen=True)
class _Chunks:
    """Computes a chunk of tokens at a time."""

    targets: mx.array
    rows: int
    """Tokens in a chunk."""
    eager: bool

    def of(self, hidden: mx.array, *results: list[mx.array]) -> Iterator[tuple[mx.array, mx.array]]:
        """Yields chunks of hidden states and targets. Each depends on the `results` of the chunk
        before it; otherwise MLX may hold the logits of many chunks."""
        for start in range(0, len(hidden), self.rows):
            chunk = slice(start, start + self.rows)
            before = [arrays[-1] for arrays in results if arrays]
            states = mx.depends([hidden[chunk]], before)[0] if before else hidden[chunk]
            yield states, self.targets[chunk]

    def losses(self, to_logits: MatMul, hidden: mx.array) -> mx.array:
        """Not differentiable."""
        losses: list[mx.array] = []
        for states, targets in self.of(hidden, losses):
            losses.append(self.detach(self.loss_and_gradient(to_logits(states), targets)[0]))
        return mx.concatenate(losses)

    def loss_and_gradient(self, logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        """Returns losses (n,) and their gradients (n, V) for logits (n, V), in float32."""
        logits = logits.astype(mx.float32)
        if self.eager and cpu_kernels.are_faster():
            return cpu_kernels.loss_and_gradient(logits, targets)
        target_logits = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        logs = mx.logsumexp(logits, axis=-1)
        probabilities = mx.exp(logits - logs[:, None])
        gradient = probabilities.at[mx.arange(len(targets)), targets].add(-1)
        return logs - target_logits, gradient

    def detach(self, array: mx.array) -> mx.array:
        return cpu_kernels.detach(array) if self.eager else array


def _head_matmuls(head: nn.Module) -> tuple[MatMul, MatMul]:
    """Multiplication by the head's matrix (V, hidden), transposed and not."""
    if not isinstance(head, (nn.QuantizedEmbedding, nn.QuantizedLinear)):
        return lambda x: x @ head.weight.T, lambda x: x @ head.weight

    def matmul(x: mx.array, transpose: bool) -> mx.array:
        options = {"transpose": transpose, **packing_options(head)}
        return mx.quantized_matmul(x, head.weight, head.scales, head.get("biases"), **options)

    return lambda x: matmul(x, True), lambda x: matmul(x, False)
