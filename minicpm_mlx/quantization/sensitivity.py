"""What rounding each matrix costs: the divergence it adds, to second order.

The divergence of a model's predictions from its own before a small change of one matrix is half the
change, squared in the metric of the Fisher information. That is taken as the product of two parts
(Martens and Grosse, arXiv 1503.05671): the mean products of the matrix's inputs, and the mean
square of the loss's gradient with respect to each output, for tokens drawn from the model itself.
One pass forwards and one backwards, a layer at a time, give both.
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
from ..model.modules import replace_module
from ..model.transformer import Block
from ..weights.lazy_tensor import LazyTensor
from .bit_allocation import CHOICES
from .gptq import Floats, nearest
from .layerwise import (
    ROWS,
    LayerRun,
    Pieces,
    at,
    matrices,
    products,
)

SAMPLED = 128
"""Rows of a matrix that are rounded to learn what rounding all of them costs."""


@dataclass(frozen=True)
class Sensitivity:
    """What is known of one matrix (out, in)."""

    inputs: Floats
    """(in, in): sum of x xT over the tokens."""
    outputs: Floats
    """(out,): sum of squared gradients over the tokens."""


class Tap(nn.Module):
    """A projection that keeps its input and adds a number to its output: 0, of which the gradient
    is wanted."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.zero, self.seen = layer, None, mx.array(0.0)

    def __call__(self, x: mx.array) -> mx.array:
        self.seen = x
        out = self.layer(x)
        return out if self.zero is None else out + self.zero


Parts = Callable[[str, Callable[[], Mapping[str, mx.array]]], Mapping[str, LazyTensor]]
"""Arrays kept under a name, which are made by calling what is given if they are not there yet."""


def in_memory(_: str, make: Callable[[], Mapping[str, mx.array]]) -> Mapping[str, LazyTensor]:
    """Arrays that nothing keeps but their user."""
    return {name: LazyTensor.of(array) for name, array in make().items()}


def costs(
    pieces: Pieces,
    texts: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    parts: Parts = in_memory,
    progress: Callable[[str], object] = lambda _: None,
) -> tuple[dict[str, dict[Quantization, float]], LazyTensor]:
    """By matrix what each packing costs, in nats a token, measured on `texts`, alike in length.

    Also the embedding's Hessian for `gptq`: as a head it is multiplied by the last states, and as
    the first layer it is looked up. `parts` keeps what each layer was found to be.
    """
    layers, tokens = pieces.config.num_hidden_layers, sum(map(len, texts))
    run = pieces.runner(len(texts[0]))
    inputs = [LazyTensor.of(mx.concatenate(pieces.start(texts)))]

    def forwards(number: int) -> dict[str, mx.array]:
        block, xs = pieces.layer(number), _each(inputs[number])
        return {"x": mx.concatenate([_done(run(block, x)) for x in xs])}

    for number in range(layers):
        inputs.append(parts(f"forwards-{number:04d}", partial(forwards, number))["x"])
        progress(f"forwards {number + 1} of {layers}")
    head = parts("head", lambda: _head(pieces, _each(inputs[-1]), seed))
    gradients, found = head["gradients"], dict[str, mx.array]()

    def backwards(number: int, gradients: LazyTensor) -> dict[str, mx.array]:
        block = pieces.layer(number)
        known, before = _backwards(block, run, _each(inputs[number]), _each(gradients))
        arrays = {n: _costs(at(block, n).weight, known[n], tokens) for n in known}
        return arrays | {"gradients": mx.concatenate(before)}

    for number in reversed(range(layers)):
        made = parts(f"backwards-{number:04d}", partial(backwards, number, gradients))
        gradients = made["gradients"]
        prefix = f"model.layers.{number}."
        found |= {prefix + name: made[name].load() for name in made if name != "gradients"}
        progress(f"backwards {layers - number} of {layers}")
    ends = parts("embedding", lambda: _embedding(pieces, texts, _each(gradients), head))
    found |= {name: ends[name].load() for name in ends if name != "hessian"}
    by_packing = {
        name: {
            how: cost
            for how, cost in zip(CHOICES, np.array(row).tolist(), strict=True)
            if cost >= 0
        }
        for name, row in found.items()
    }
    return by_packing, ends["hessian"]


def _each(stacked: LazyTensor) -> list[mx.array]:
    """Of every text its (1, T, hidden)."""
    array = stacked.load()
    return list(mx.split(array, len(array)))


def _done(array: mx.array) -> mx.array:
    mx.eval(array)
    return array


def _head(pieces: Pieces, xs: list[mx.array], seed: int) -> dict[str, mx.array]:
    """Products of the head's inputs, gradients at the last block's output, and at the head's.

    The latter are summed in expectation: p (1 - p) for each token of the vocabulary.
    """
    weight = pieces[pieces.head_name]
    inputs = sum((products(pieces.finish(x)) for x in xs), mx.array(0.0))
    outputs, key = mx.zeros((weight.shape[0],)), mx.random.key(seed)
    gradients = []
    for x in xs:
        hidden, parts = pieces.finish(x)[0], []
        for begin in range(0, len(hidden), ROWS):
            logits = hidden[begin : begin + ROWS] @ weight.T
            key, draw = mx.random.split(key)
            p, drawn = mx.softmax(logits, axis=-1), mx.random.categorical(logits, key=draw)
            outputs = outputs + (p * (1 - p)).sum(axis=0)
            parts.append(p @ weight - weight[drawn])
            mx.eval(outputs, parts)
        (gradient,) = mx.vjp(pieces.finish, [x], [mx.concatenate(parts)[None]])[1]
        gradients.append(_done(gradient))
    return {"inputs": inputs, "outputs": outputs, "gradients": mx.concatenate(gradients)}


def _embedding(
    pieces: Pieces,
    texts: Sequence[Sequence[int]],
    gradients: list[mx.array],
    head: Mapping[str, LazyTensor],
) -> dict[str, mx.array]:
    """Costs of the embedding and the head, which may be one matrix, and the embedding's Hessian."""
    weight, tokens = pieces["model.embed_tokens.weight"], sum(map(len, texts))
    as_head = Sensitivity(*(np.array(head[name].load()) for name in ("inputs", "outputs")))
    looked_up = sum((products(g) for g in gradients), mx.array(0.0)) * pieces.config.scale_emb**2
    counts = np.bincount(np.concatenate(texts), minlength=len(weight)).astype(np.float32)
    as_input = Sensitivity(np.array(looked_up), counts)
    found = {"model.embed_tokens": _costs(weight, as_input, tokens)}
    if not pieces.config.tie_word_embeddings:
        found["lm_head"] = _costs(pieces["lm_head.weight"], as_head, tokens)
        return found | {"hessian": looked_up}
    found["model.embed_tokens"] += _costs(weight, as_head, tokens)
    both = as_head.inputs * as_head.outputs.sum() + as_input.inputs * counts.sum()
    return found | {"hessian": mx.array(both)}


def _backwards(
    block: Block, run: LayerRun, xs: list[mx.array], gradients: list[mx.array]
) -> tuple[dict[str, Sensitivity], list[mx.array]]:
    """The sensitivity of each matrix of a block, and the gradients at its input.

    `xs` are its inputs, `gradients` those at its output; both are used up.
    """
    taps: dict[str, Any] = {name: Tap(at(block, name)) for name in matrices(block)}
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


def _costs(weight: mx.array, known: Sensitivity, tokens: int) -> mx.array:
    """What each packing of CHOICES costs; -1 where the rows of `weight` do not divide into it."""
    matter = np.flatnonzero(known.outputs)  # of an embedding the rows of tokens that were met
    rows = matter[:: max(1, len(matter) // SAMPLED)]
    sample, outputs = np.array(weight[mx.array(rows)]), known.outputs[rows]
    share = known.outputs.sum() / max(float(outputs.sum()), 1e-30)
    importance = np.diag(known.inputs).astype(np.float32)
    found = [-1.0] * len(CHOICES)
    for place, packing in enumerate(CHOICES):
        if weight.shape[1] % packing.group_size == 0:
            rounded = nearest(sample, importance, packing.bits, packing.group_size, mx.float16)
            error = sample - rounded
            squares = ((error @ known.inputs) * error).sum(axis=1)
            found[place] = float(squares @ outputs * share) / 2 / tokens**2
    return mx.array(found)
