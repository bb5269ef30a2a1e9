"""Sensitivity: the divergence that rounding each matrix adds, to second order.

A small change W of one matrix adds a KL divergence of WT F W / 2, where F is the Fisher
information. F is approximated by a Kronecker product (K-FAC, Martens and Grosse, arXiv 1503.05671):
the mean of x xT over the matrix's inputs, and the mean squared gradient of the loss with respect to
each output, for tokens sampled from the model itself. One forward and one backward pass, layer by
layer, give both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..model.config_sections import Quantization
from ..model.modules import at, replace_module
from ..model.transformer import Block
from ..weights.lazy_tensor import LazyTensor
from .bit_allocation import CHOICES
from .gptq import Floats, nearest
from .layerwise import ROWS, LayerReader, LayerRun, matrices, products

SAMPLED = 128
"""Rows of a matrix that are rounded to estimate the cost of all."""


@dataclass(frozen=True)
class Sensitivity:
    """Statistics of one matrix (out, in)."""

    inputs: Floats
    """(in, in): sum of x xT over the tokens."""
    outputs: Floats
    """(out,): sum of squared gradients over the tokens."""


class GradientTap(nn.Module):
    """A projection that records its input and adds `zero` to its output.

    The gradient with respect to `zero` is the gradient at the output.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.zero, self.seen = layer, None, mx.array(0.0)

    def __call__(self, x: mx.array) -> mx.array:
        self.seen = x
        out = self.layer(x)
        return out if self.zero is None else out + self.zero


Parts = Callable[[str, Callable[[], Mapping[str, mx.array]]], Mapping[str, LazyTensor]]
"""Loads the arrays kept under a name, and calls the given function for them if there are none."""


def in_memory(_: str, make: Callable[[], Mapping[str, mx.array]]) -> Mapping[str, LazyTensor]:
    return {name: LazyTensor.of(array) for name, array in make().items()}


def costs(
    reader: LayerReader,
    texts: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    parts: Parts = in_memory,
    progress: Callable[[str], object] = lambda _: None,
) -> tuple[dict[str, dict[Quantization, float]], LazyTensor]:
    """The cost of each packing of each matrix, in nats a token, measured on `texts` of one length.

    Also returns the embedding's Hessian for GPTQ, which combines its uses as the first layer and,
    if tied, as the head. `parts` keeps the results of each layer.
    """
    layers, tokens = reader.config.num_hidden_layers, sum(map(len, texts))
    run = reader.runner(len(texts[0]))
    inputs = [LazyTensor.of(mx.concatenate(reader.start(texts)))]

    def forwards(number: int) -> dict[str, mx.array]:
        block, xs = reader.layer(number), _each(inputs[number])
        return {"x": mx.concatenate([_evaluated(run(block, x)) for x in xs])}

    for number in range(layers):
        inputs.append(parts(f"forwards-{number:04d}", partial(forwards, number))["x"])
        progress(f"forwards {number + 1} of {layers}")
    head = parts("head", lambda: _head(reader, _each(inputs[-1]), seed))
    gradients, rows = head["gradients"], dict[str, mx.array]()

    def backwards(number: int, gradients: LazyTensor) -> dict[str, mx.array]:
        block = reader.layer(number)
        stats, earlier = _backwards(block, run, _each(inputs[number]), _each(gradients))
        arrays = {n: _costs(at(block, n).weight, stats[n], tokens) for n in stats}
        return arrays | {"gradients": mx.concatenate(earlier)}

    for number in reversed(range(layers)):
        layer = parts(f"backwards-{number:04d}", partial(backwards, number, gradients))
        gradients = layer["gradients"]
        prefix = f"model.layers.{number}."
        rows |= {prefix + name: layer[name].load() for name in layer if name != "gradients"}
        progress(f"backwards {layers - number} of {layers}")
    ends = parts("embedding", lambda: _embedding(reader, texts, _each(gradients), head))
    rows |= {name: ends[name].load() for name in ends if name != "hessian"}
    by_packing = {
        name: {
            packing: cost
            for packing, cost in zip(CHOICES, np.array(row).tolist(), strict=True)
            if cost >= 0
        }
        for name, row in rows.items()
    }
    return by_packing, ends["hessian"]


def _each(stacked: LazyTensor) -> list[mx.array]:
    """The (1, T, hidden) of each text."""
    array = stacked.load()
    return list(mx.split(array, len(array)))


def _evaluated(array: mx.array) -> mx.array:
    mx.eval(array)
    return array


def _head(reader: LayerReader, xs: list[mx.array], seed: int) -> dict[str, mx.array]:
    """Statistics of the head, and the gradients at the last block's output.

    Squared gradients at the head's outputs are their expectation, p (1 - p) for each token of the
    vocabulary; gradients passed back are of one sampled token.
    """
    weight = reader[reader.head_name]
    inputs = sum((products(reader.finish(x)) for x in xs), mx.array(0.0))
    outputs, key = mx.zeros((weight.shape[0],)), mx.random.key(seed)
    gradients = []
    for x in xs:
        hidden, parts = reader.finish(x)[0], []
        for begin in range(0, len(hidden), ROWS):
            logits = hidden[begin : begin + ROWS] @ weight.T
            key, draw = mx.random.split(key)
            p, sampled = mx.softmax(logits, axis=-1), mx.random.categorical(logits, key=draw)
            outputs = outputs + (p * (1 - p)).sum(axis=0)
            parts.append(p @ weight - weight[sampled])
            mx.eval(outputs, parts)
        (gradient,) = mx.vjp(reader.finish, [x], [mx.concatenate(parts)[None]])[1]
        gradients.append(_evaluated(gradient))
    return {"inputs": inputs, "outputs": outputs, "gradients": mx.concatenate(gradients)}


def _embedding(
    reader: LayerReader,
    texts: Sequence[Sequence[int]],
    gradients: list[mx.array],
    head: Mapping[str, LazyTensor],
) -> dict[str, mx.array]:
    """Costs of the embedding and the head, which may be one matrix, and the embedding's Hessian."""
    weight, tokens = reader["model.embed_tokens.weight"], sum(map(len, texts))
    as_head = Sensitivity(*(np.array(head[name].load()) for name in ("inputs", "outputs")))
    looked_up = sum((products(g) for g in gradients), mx.array(0.0)) * reader.config.scale_emb**2
    counts = np.bincount(np.concatenate(texts), minlength=len(weight)).astype(np.float32)
    as_input = Sensitivity(np.array(looked_up), counts)
    arrays = {"model.embed_tokens": _costs(weight, as_input, tokens)}
    if not reader.config.tie_word_embeddings:
        arrays["lm_head"] = _costs(reader["lm_head.weight"], as_head, tokens)
        return arrays | {"hessian": looked_up}
    arrays["model.embed_tokens"] += _costs(weight, as_head, tokens)
    both = as_head.inputs * as_head.outputs.sum() + as_input.inputs * counts.sum()
    return arrays | {"hessian": mx.array(both)}


def _backwards(
    block: Block, run: LayerRun, xs: list[mx.array], gradients: list[mx.array]
) -> tuple[dict[str, Sensitivity], list[mx.array]]:
    """The sensitivity of each matrix of a block, and the gradients at the block's input.

    `xs` are the block's inputs, `gradients` those at its output. Both lists are emptied.
    """
    taps: dict[str, Any] = {name: GradientTap(at(block, name)) for name in matrices(block)}
    for name, tap in taps.items():
        replace_module(block, name, tap)

    def tapped(x: mx.array, *zeros: mx.array | None) -> mx.array:
        for tap, zero in zip(taps.values(), zeros, strict=True):
            tap.zero = zero
        return run(block, x)

    inputs = dict.fromkeys(taps, mx.array(0.0))
    outputs = dict.fromkeys(taps, mx.array(0.0))
    before = []
    while xs:
        x, gradient = xs.pop(0), gradients.pop(0)
        tapped(x, *[None] * len(taps))
        inputs = {name: inputs[name] + products(tap.seen) for name, tap in taps.items()}
        mx.eval(inputs)
        zeros = [mx.zeros((1, x.shape[1], len(tap.layer.weight))) for tap in taps.values()]
        first, *others = mx.vjp(tapped, [x, *zeros], [gradient])[1]
        squares = [(other[0] ** 2).sum(axis=0) for other in others]
        outputs = {n: outputs[n] + s for n, s in zip(taps, squares, strict=True)}
        mx.eval(first, outputs)
        before.append(first)
    for name, tap in taps.items():
        replace_module(block, name, tap.layer)
    return {n: Sensitivity(np.array(inputs[n]), np.array(outputs[n])) for n in taps}, before


def _costs(weight: mx.array, stats: Sensitivity, tokens: int) -> mx.array:
    """The cost of each of CHOICES; -1 if the rows of `weight` do not divide into its groups."""
    used = np.flatnonzero(stats.outputs)  # of an embedding, the rows of tokens in the texts
    rows = used[:: max(1, len(used) // SAMPLED)]
    sample, outputs = np.array(weight[mx.array(rows)]), stats.outputs[rows]
    scale = stats.outputs.sum() / max(float(outputs.sum()), 1e-30)  # from the sample to all rows
    importance = np.diag(stats.inputs).astype(np.float32)
    costs = [-1.0] * len(CHOICES)
    for index, packing in enumerate(CHOICES):
        if weight.shape[1] % packing.group_size == 0:
            rounded = nearest(sample, importance, packing.bits, packing.group_size, mx.float16)
            error = sample - rounded
            squares = ((error @ stats.inputs) * error).sum(axis=1)
            costs[index] = float(squares @ outputs * scale) / 2 / tokens**2
    return mx.array(costs)
