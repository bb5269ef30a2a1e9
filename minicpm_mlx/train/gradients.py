"""Losses and gradients of a model: of the whole graph, or layer by layer.

Layer by layer, only the inputs of the layers are kept, and each layer is computed again for its
gradients (checkpointing; Chen et al., arXiv 1604.06174). MLX's transformations see one layer at a
time, so values are available between layers and a CPU can use NumPy (see cpu_kernels.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
from mlx.utils import tree_unflatten

from ..model.attention import Mask
from ..model.rope import Rotation
from ..model.transformer import Block, Model, prepare_pass
from . import cpu_kernels
from .cross_entropy import token_losses
from .data.batches import TrainingBatch

Arrays = dict[str, mx.array]

Reduction = Callable[[mx.array], Arrays]
"""Reduces the losses of tokens (N,) to sums over samples, among them "loss"."""

EMBEDDING = "model.embed_tokens.weight"


def set_parameters(model: Model, parameters: Arrays) -> None:
    """Sets parameters of the model by name."""
    model.update(tree_unflatten(list(parameters.items())))


def batch_losses(model: Model, batch: TrainingBatch) -> mx.array:
    """Cross-entropy of the batch's targets: (N,), in nats; not differentiable."""
    rotate, mask = _rope_and_mask(model, batch)
    x = model.model.embed_tokens(batch.ids) * model.model.scale_emb
    for layer in model.layers:
        x = layer(x, rotate, mask, None)
        cpu_kernels.evaluate(x)
    return _target_losses(model, batch, x, gradients=False)


def full_gradients(
    model: Model, parameters: Arrays, batch: TrainingBatch, reduction: Reduction, total: mx.array
) -> tuple[Arrays, Arrays]:
    """Returns the sums of `reduction`, and the gradients of its loss divided by `total`."""

    def loss(parameters: Arrays) -> tuple[mx.array, Arrays]:
        set_parameters(model, parameters)
        hidden = model.hidden(batch.ids)
        hidden = hidden.reshape(-1, hidden.shape[-1])[batch.positions]  # (N, hidden)
        sums = reduction(token_losses(model, hidden, batch.targets))
        return sums["loss"] / total, sums

    (_, sums), gradients = mx.value_and_grad(loss)(parameters)
    return sums, gradients


def layerwise_gradients(
    model: Model, parameters: Arrays, batch: TrainingBatch, reduction: Reduction, total: mx.array
) -> tuple[Arrays, Arrays]:
    """Like `full_gradients`, layer by layer."""
    set_parameters(model, parameters)
    layers, scale = model.layers, model.model.scale_emb
    by_layer = [_layer_parameters(parameters, index) for index in range(len(layers))]
    outer = {n: a for n, a in parameters.items() if not n.startswith("model.layers.")}
    trained = [index for index, own in enumerate(by_layer) if own]
    # Gradients need not reach the layers below the first that is trained.
    first = 0 if EMBEDDING in outer else min(trained, default=len(layers))
    rotate, mask = _rope_and_mask(model, batch)
    x = model.model.embed_tokens(batch.ids) * scale
    inputs = []
    for index, layer in enumerate(layers):
        if index >= first:
            inputs.append(x)
        x = layer(x, rotate, mask, None)
        cpu_kernels.evaluate(x)

    def loss(outer: Arrays, x: mx.array) -> tuple[mx.array, Arrays]:
        set_parameters(model, outer)
        sums = reduction(_target_losses(model, batch, x))
        return sums["loss"] / total, sums

    (_, sums), (gradients, above) = mx.value_and_grad(loss, argnums=(0, 1))(outer, x)
    gradients = dict(gradients)
    cpu_kernels.evaluate(sums, gradients, above)
    for index in reversed(range(first, len(layers))):
        names, values = list(by_layer[index]), list(by_layer[index].values())
        run = partial(_run_layer, layers[index], names, rotate, mask)
        # Without this dependency MLX may compute all layers again before the first gradient.
        (x,) = mx.depends([inputs.pop()], [above])
        _, (*own_gradients, above) = mx.vjp(run, [*values, x], [above])
        full_names = [f"model.layers.{index}.{name}" for name in names]
        gradients |= dict(zip(full_names, own_gradients, strict=True))
        cpu_kernels.evaluate(gradients, above)
    if EMBEDDING in outer:  # a tied embedding already has the gradient of the head
        rows = mx.zeros(outer[EMBEDDING].shape).at[batch.ids].add(above * scale)
        head = gradients[EMBEDDING]
        gradients[EMBEDDING] = head + rows.astype(head.dtype)
    set_parameters(model, parameters)
    return sums, {name: gradients[name] for name in parameters}


def _run_layer(
    layer: Block, names: list[str], rotate: Rotation, mask: Mask, *values: mx.array
) -> mx.array:
    """Runs `layer` as a function of its parameters, named `names`, and of its input."""
    *parameters, x = values
    layer.update(tree_unflatten(list(zip(names, parameters, strict=True))))
    return layer(x, rotate, mask, None)


def _layer_parameters(parameters: Arrays, index: int) -> Arrays:
    prefix = f"model.layers.{index}."
    return {n.removeprefix(prefix): a for n, a in parameters.items() if n.startswith(prefix)}


def _rope_and_mask(model: Model, batch: TrainingBatch) -> tuple[Rotation, Mask]:
    rotate, mask, _ = prepare_pass(model.model.rope, batch.ids, None, len(model.layers), None)
    return rotate, mask


def _target_losses(
    model: Model, batch: TrainingBatch, x: mx.array, *, gradients: bool = True
) -> mx.array:
    """Maps the output of the last layer to the losses of the targets."""
    hidden = model.model.norm(x.reshape(-1, x.shape[-1])[batch.positions])
    return token_losses(model, hidden, batch.targets, gradients=gradients, eager=True)
