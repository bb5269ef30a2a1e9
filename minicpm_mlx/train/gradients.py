"""A model's loss and its gradients: of the whole graph at once, or a layer at a time.

A layer at a time, only the inputs of layers are kept, and each is computed again for its gradients
(checkpointing; Chen et al., arXiv 1604.06174). That is done outside of MLX's transformations, so
that values are at hand, and a CPU can use NumPy's exponentials (see kernels.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
from mlx.utils import tree_unflatten

from .. import device
from ..model.rope import Rotation
from ..model.transformer import (
    Block,
    Mask,
    Model,
    prepare,
)
from .cross_entropy import token_losses
from .data.batches import TrainingBatch

Arrays = dict[str, mx.array]

Tail = Callable[[mx.array], Arrays]
"""Losses of tokens (N,) to sums over samples, among them "loss"."""


def set_parameters(model: Model, parameters: Arrays) -> None:
    """Put parameters in the model, by name."""
    model.update(tree_unflatten(list(parameters.items())))


def batch_losses(model: Model, batch: TrainingBatch) -> mx.array:
    """The cross-entropy of each token of `batch` that counts: (N,), in nats; not differentiable."""
    decoder = model.model
    x = decoder.embed_tokens(batch.ids) * decoder.scale_emb
    rotate, mask = _shared(model, batch)
    for layer in decoder.layers:
        x = layer(x, rotate, mask, None)
        _settle(x)
    return _last(model, batch, x, gradients=False)


def full_gradients(
    model: Model, parameters: Arrays, batch: TrainingBatch, tail: Tail, total: mx.array
) -> tuple[Arrays, Arrays]:
    """The sums that `tail` gives, and the gradients of its loss divided by `total`."""

    def loss(parameters: Arrays) -> tuple[mx.array, Arrays]:
        set_parameters(model, parameters)
        hidden = model.hidden(batch.ids)
        hidden = hidden.reshape(-1, hidden.shape[-1])[batch.positions]
        sums = tail(token_losses(model, hidden, batch.targets))
        return sums["loss"] / total, sums

    (_, sums), gradients = mx.value_and_grad(loss)(parameters)
    return sums, gradients


def layerwise_gradients(
    model: Model, parameters: Arrays, batch: TrainingBatch, tail: Tail, total: mx.array
) -> tuple[Arrays, Arrays]:
    """The same, a layer at a time."""
    set_parameters(model, parameters)
    decoder, found = model.model, dict[str, mx.array]()
    inside = [_inside(parameters, number) for number in range(len(decoder.layers))]
    ends = {n: a for n, a in parameters.items() if not n.startswith("model.layers.")}
    embedding = "model.embed_tokens.weight"
    trained = [number for number, own in enumerate(inside) if own]
    first = 0 if embedding in ends else min(trained, default=len(inside))
    rotate, mask = _shared(model, batch)
    x = decoder.embed_tokens(batch.ids) * decoder.scale_emb
    inputs = []
    for number, layer in enumerate(decoder.layers):
        if number >= first:
            inputs.append(x)
        x = layer(x, rotate, mask, None)
        _settle(x)

    def end(ends: Arrays, x: mx.array) -> tuple[mx.array, Arrays]:
        set_parameters(model, ends)
        sums = tail(_last(model, batch, x))
        return sums["loss"] / total, sums

    (_, sums), (found_at_end, above) = mx.value_and_grad(end, argnums=(0, 1))(ends, x)
    found |= found_at_end
    _settle(sums, found, above)
    for number in reversed(range(first, len(inside))):
        own = inside[number]
        names = list(own)
        run = partial(_run, decoder.layers[number], names, rotate, mask)
        (x,) = mx.depends([inputs.pop()], [above])  # or MLX may compute all layers again at first
        _, changes = mx.vjp(run, [*own.values(), x], [above])
        *of_own, above = changes
        prefix = f"model.layers.{number}."
        found |= {prefix + name: array for name, array in zip(names, of_own, strict=True)}
        _settle(found, above)
    if embedding in ends:
        rows = mx.zeros(ends[embedding].shape).at[batch.ids].add(above * decoder.scale_emb)
        found[embedding] = found[embedding] + rows.astype(found[embedding].dtype)
    set_parameters(model, parameters)
    return sums, {name: found[name] for name in parameters}


def _run(
    layer: Block, names: list[str], rotate: Rotation, mask: Mask, *values: mx.array
) -> mx.array:
    """`layer` of values for the parameters so named, and for its input."""
    *own, x = values
    layer.update(tree_unflatten(list(zip(names, own, strict=True))))
    return layer(x, rotate, mask, None)


def _inside(parameters: Arrays, number: int) -> Arrays:
    prefix = f"model.layers.{number}."
    return {n.removeprefix(prefix): a for n, a in parameters.items() if n.startswith(prefix)}


def _shared(model: Model, batch: TrainingBatch) -> tuple[Rotation, Mask]:
    rotate, mask, _ = prepare(model.model.rope, batch.ids, None, len(model.layers), None)
    return rotate, mask


def _last(model: Model, batch: TrainingBatch, x: mx.array, *, gradients: bool = True) -> mx.array:
    """What the last layer made, to the losses of the tokens that count."""
    hidden = model.model.norm(x.reshape(-1, x.shape[-1])[batch.positions])
    return token_losses(
        model, hidden, batch.targets, gradients=gradients, full_gradients=device.on_cpu()
    )


def _settle(*arrays: object) -> None:
    """Compute at once, where nothing else goes on meanwhile, so that memory is free again."""
    if device.on_cpu():
        mx.eval(arrays)
