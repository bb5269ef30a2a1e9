"""Cross-entropy over a large vocabulary, some tokens at a time, so that logits are never all held.

The gradient with respect to a token's hidden state needs the same probabilities as its loss, so it
is computed along with it, and logits are computed once. The head itself is not trained in most
runs; where it is, the logits are computed again for its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import device
from ..model.kernels import cpu_softmax
from ..model.transformer import Model

CHUNK = 1 << 24
"""Logits that are held at once: 64 MB in float32."""


def token_losses(
    model: Model,
    hidden: mx.array,
    targets: mx.array,
    *,
    gradients: bool = True,
    at_once: bool = False,
) -> mx.array:
    """Of hidden states (N, hidden) the cross-entropy of `targets` (N,), in nats: (N,), float32.

    Without `gradients` it takes less time and cannot be differentiated. `at_once` computes values
    rather than a graph, as a CPU is faster with; not inside of mx.compile.
    """
    config = model.config
    head = model.model.embed_tokens if config.tie_word_embeddings else model.lm_head
    hidden = hidden / config.logit_divisor
    parts = _Parts(targets, max(CHUNK // config.vocab_size, 1), at_once)
    if not gradients:
        to_logits, _ = _both_ways(head)
        return parts.losses(to_logits, hidden)
    if "weight" in head.trainable_parameters():
        return _with_head(hidden, head.weight, parts)
    return _frozen(hidden, head, parts)


def _frozen(hidden: mx.array, head: nn.Module, parts: _Parts) -> mx.array:
    to_logits, back = _both_ways(head)

    @mx.custom_function
    def losses(hidden: mx.array) -> tuple[mx.array, mx.array]:
        found: list[mx.array] = []
        gradients: list[mx.array] = []
        for states, targets in parts.of(hidden, found, gradients):
            loss, change = parts.loss_and_change(to_logits(states), targets)
            found.append(parts.kept(loss))
            gradients.append(parts.kept(back(change.astype(hidden.dtype))))
        return mx.concatenate(found), mx.concatenate(gradients)

    @losses.vjp
    def gradients(
        _: mx.array, above: tuple[mx.array, mx.array], made: tuple[mx.array, mx.array]
    ) -> mx.array:
        return above[0][:, None].astype(made[1].dtype) * made[1]

    both: Any = losses(hidden)
    return both[0]


def _with_head(hidden: mx.array, weight: mx.array, parts: _Parts) -> mx.array:
    @mx.custom_function
    def losses(hidden: mx.array, weight: mx.array) -> mx.array:
        return parts.losses(lambda x: x @ weight.T, hidden)

    @losses.vjp
    def gradients(
        inputs: list[mx.array], above: mx.array, _: mx.array
    ) -> tuple[mx.array, mx.array]:
        hidden, weight = inputs
        to_hidden: list[mx.array] = []
        to_weight = [mx.zeros(weight.shape, mx.float32)]
        begin = 0
        for states, targets in parts.of(hidden, to_hidden, to_weight):
            change = parts.loss_and_change(states @ weight.T, targets)[1]
            change = change * above[begin : begin + len(targets), None]
            change = change.astype(weight.dtype)
            to_hidden.append(parts.kept(change @ weight))
            to_weight[0] = parts.kept(to_weight[0] + change.T @ states)
            begin += len(targets)
        return mx.concatenate(to_hidden), to_weight[0].astype(weight.dtype)

    found: Any = losses(hidden, weight)
    return found


@dataclass(frozen=True)
class _Parts:
    """Some tokens at a time."""

    targets: mx.array
    rows: int
    """Tokens in a part."""
    at_once: bool

    def of(self, hidden: mx.array, *made: list[mx.array]) -> Iterator[tuple[mx.array, mx.array]]:
        """Parts of hidden states and targets, each after what was `made` of the one before: else
        MLX may hold the logits of many."""
        for start in range(0, len(hidden), self.rows):
            at = slice(start, start + self.rows)
            before = [arrays[-1] for arrays in made if arrays]
            states = mx.depends([hidden[at]], before)[0] if before else hidden[at]
            yield states, self.targets[at]

    def losses(self, to_logits: Callable[[mx.array], mx.array], hidden: mx.array) -> mx.array:
        """Of all, not to be differentiated."""
        found: list[mx.array] = []
        for states, targets in self.of(hidden, found):
            found.append(self.kept(self.loss_and_change(to_logits(states), targets)[0]))
        return mx.concatenate(found)

    def loss_and_change(self, logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        """Of logits (n, V) the losses (n,) and their gradients (n, V), in float32."""
        logits = logits.astype(mx.float32)
        of_targets = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        if self.at_once and device.slow_exponentials():
            mx.eval(of_targets, logits)
            probabilities, logs = cpu_softmax.softmax(logits)
            rows = np.array(probabilities, copy=False)
            rows[np.arange(len(rows)), np.array(targets)] -= 1
            return logs - of_targets, probabilities
        logs = mx.logsumexp(logits, axis=-1)
        probabilities = mx.exp(logits - logs[:, None])
        return logs - of_targets, probabilities.at[mx.arange(len(targets)), targets].add(-1)

    def kept(self, array: mx.array) -> mx.array:
        """`array`; its values alone if they are wanted at once. MLX holds whatever an array was
        made of while it differentiates."""
        if not self.at_once:
            return array
        return mx.array(np.array(array.astype(mx.float32))).astype(array.dtype)


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
