"""Cross-entropy over a large vocabulary, some tokens at a time, so that logits are never all held.

The gradient with respect to a token's hidden state needs the same probabilities as its loss, so it
is computed along with it, and logits are computed once. The head itself is not trained in most
runs; where it is, the logits are computed again for its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import device, exponentials
from ..model import Model

CHUNK = 1 << 24
"""Logits that are held at once: 64 MB in float32."""


def token_losses(
    model: Model, hidden: mx.array, targets: mx.array, *, gradients: bool = True
) -> mx.array:
    """Of hidden states (N, hidden) the cross-entropy of `targets` (N,), in nats: (N,), float32.

    Without `gradients` it takes less time and cannot be differentiated.
    """
    config = model.config
    head = model.model.embed_tokens if config.tie_word_embeddings else model.lm_head
    hidden = hidden / config.logit_divisor
    rows = max(CHUNK // config.vocab_size, 1)
    if not gradients:
        to_logits, _ = _both_ways(head)
        return _losses(to_logits, hidden, targets, rows)
    if "weight" in head.trainable_parameters():
        return _with_head(hidden, head.weight, targets, rows)
    return _frozen(hidden, head, targets, rows)


def _frozen(hidden: mx.array, head: nn.Module, targets: mx.array, rows: int) -> mx.array:
    to_logits, back = _both_ways(head)

    @mx.custom_function
    def losses(hidden: mx.array) -> tuple[mx.array, mx.array]:
        found: list[mx.array] = []
        gradients: list[mx.array] = []
        for start in range(0, len(hidden), rows):
            at = slice(start, start + rows)
            states = hidden[at]
            if found:  # one part after the other, or MLX may hold the logits of many
                states = mx.depends([states], [found[-1], gradients[-1]])[0]
            loss, change = _loss_and_change(to_logits(states), targets[at])
            found.append(loss)
            gradients.append(back(change.astype(hidden.dtype)))
            _settle(found[-1], gradients[-1])
        return mx.concatenate(found), mx.concatenate(gradients)

    @losses.vjp
    def gradients(
        _: mx.array, above: tuple[mx.array, mx.array], made: tuple[mx.array, mx.array]
    ) -> mx.array:
        return above[0][:, None].astype(made[1].dtype) * made[1]

    both: Any = losses(hidden)
    return both[0]


def _with_head(hidden: mx.array, weight: mx.array, targets: mx.array, rows: int) -> mx.array:
    @mx.custom_function
    def losses(hidden: mx.array, weight: mx.array) -> mx.array:
        return _losses(lambda x: x @ weight.T, hidden, targets, rows)

    @losses.vjp
    def gradients(
        inputs: list[mx.array], above: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array]:
        hidden, weight = inputs
        to_hidden: list[mx.array] = []
        to_weight = mx.zeros(weight.shape, mx.float32)
        for start in range(0, len(hidden), rows):
            at = slice(start, start + rows)
            states = mx.depends([hidden[at]], [to_weight])[0]
            change = _loss_and_change(states @ weight.T, targets[at])[1] * above[at][:, None]
            change = change.astype(weight.dtype)
            to_hidden.append(change @ weight)
            to_weight = to_weight + change.T @ states
            _settle(to_hidden[-1], to_weight)
        return mx.concatenate(to_hidden), to_weight.astype(weight.dtype)

    found: Any = losses(hidden, weight)
    return found


def _losses(
    to_logits: Callable[[mx.array], mx.array], hidden: mx.array, targets: mx.array, rows: int
) -> mx.array:
    found: list[mx.array] = []
    for start in range(0, len(hidden), rows):
        at = slice(start, start + rows)
        states = mx.depends([hidden[at]], found[-1:])[0]
        found.append(_loss_and_change(to_logits(states), targets[at])[0])
        _settle(found[-1])
    return mx.concatenate(found)


def _settle(*arrays: mx.array) -> None:
    """Compute at once where nothing else goes on meanwhile, so that memory is free again."""
    if device.on_cpu():
        mx.eval(arrays)


def _both_ways(
    head: nn.Module,
) -> tuple[Callable[[mx.array], mx.array], Callable[[mx.array], mx.array]]:
    """Multiplication by the head's matrix (V, hidden), transposed and not."""
    if not isinstance(head, (nn.QuantizedEmbedding, nn.QuantizedLinear)):
        return lambda x: x @ head.weight.T, lambda x: x @ head.weight

    def times(x: mx.array, transpose: bool) -> mx.array:
        return mx.quantized_matmul(
            x,
            head.weight,
            head.scales,
            head.get("biases"),
            transpose=transpose,
            group_size=head.group_size,
            bits=head.bits,
            mode=head.mode,
        )

    return lambda x: times(x, True), lambda x: times(x, False)


def _loss_and_change(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Of logits (n, V) the losses (n,) and their gradients (n, V), in float32."""
    logits = logits.astype(mx.float32)
    target_logits = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    if device.slow_exponentials() and logits.size > exponentials.FEW:
        mx.eval(target_logits, logits)
        probabilities, logs = exponentials.softmax(logits)
    else:
        logs = mx.logsumexp(logits, axis=-1)
        probabilities = mx.exp(logits - logs[:, None])
    places = mx.arange(len(targets))
    return logs - target_logits, probabilities.at[places, targets].add(-1)
