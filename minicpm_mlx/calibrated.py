"""Quantization that looks at what each matrix reads: GPTQ, a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from .config_parts import Quantization
from .gptq import Packed, gptq, packed
from .model import Model, prepare
from .quantize import packable, replace

SCALES = mx.float16
"""In which scales and biases are kept: of 16-bit formats the one with more digits."""


class Recorder(nn.Module):
    """A projection that sums x xT over the inputs it sees."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.hessian = mx.zeros((layer.weight.shape[1],) * 2)

    def __call__(self, x: mx.array) -> mx.array:
        self.hessian = self.hessian + _products(x)
        return self.layer(x)


def quantize_gptq(
    model: Model,
    packing: Quantization,
    texts: Sequence[Sequence[int]],
    progress: Callable[[str], object] = lambda _: None,
) -> dict[str, Quantization]:
    """Round every matrix of `model`, in place, by what it reads of `texts`, alike in length.

    Each layer sees what the rounded ones before it make, and is computed in float32. A layer at a
    time is in memory dense; what comes before and after is packed or not read yet. Returns how each
    module was packed. Routers stay as they are.
    """
    done: dict[str, Quantization] = {}
    decoder = model.model
    xs = [decoder.embed_tokens(mx.array([text])).astype(mx.float32) for text in texts]
    xs = [x * decoder.scale_emb for x in xs]
    rotate, mask, _ = prepare(decoder.rope, mx.array([texts[0]]), None, len(model.layers), None)
    for number, layer in enumerate(model.layers):
        stored = layer.input_layernorm.weight.dtype
        _cast(layer, mx.float32)
        names = [name for name, child in layer.named_modules() if _is_matrix(name, child, packing)]
        for name in names:
            replace(layer, name, Recorder(_at(layer, name)))
        for x in xs:
            mx.eval(layer(x, rotate, mask, None), [_at(layer, name).hessian for name in names])
        for name in names:
            recorder: Any = _at(layer, name)
            replace(layer, name, _rounded(recorder.layer, recorder.hessian, packing))
            done[f"model.layers.{number}.{name}"] = packing
        xs = [layer(x, rotate, mask, None) for x in xs]
        mx.eval(xs)
        _cast(layer, stored)
        mx.eval(layer.parameters())
        progress(f"layer {number + 1} of {len(model.layers)}")
    hessian = sum((_products(_head_input(model, x)) for x in xs), mx.array(0.0))
    if packable(decoder.embed_tokens, packing.group_size):
        # As a head it is multiplied by the last states; alone it is looked up, a row at a time.
        tied = model.config.tie_word_embeddings
        seen = hessian if tied else mx.eye(decoder.embed_tokens.weight.shape[1])
        replace(model, "model.embed_tokens", _rounded(decoder.embed_tokens, seen, packing))
        done["model.embed_tokens"] = packing
        progress("embedding")
    if not model.config.tie_word_embeddings and packable(model.lm_head, packing.group_size):
        replace(model, "lm_head", _rounded(model.lm_head, hessian, packing))
        done["lm_head"] = packing
        progress("head")
    mx.eval(model.parameters())
    return done


def _products(x: mx.array) -> mx.array:
    rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
    return rows.T @ rows


def _head_input(model: Model, x: mx.array) -> mx.array:
    norm = model.model.norm
    normed = mx.fast.rms_norm(x, norm.weight.astype(mx.float32), norm.eps)
    return normed / model.config.logit_divisor


def _is_matrix(name: str, module: nn.Module, packing: Quantization) -> bool:
    router = name == "mlp.gate"  # small, and a token sent elsewhere is a large error
    return type(module) is nn.Linear and packable(module, packing.group_size) and not router


def _rounded(layer: nn.Module, hessian: mx.array, packing: Quantization) -> nn.Module:
    weight = np.array(layer.weight.astype(mx.float32))
    found = gptq(weight, np.array(hessian), packing.bits, packing.group_size, SCALES)
    return _module(layer, found, packing)


def _module(layer: nn.Module, found: Packed, packing: Quantization) -> nn.Module:
    """The packed form of `layer`, with the codes that were found."""
    size, bits = packing.group_size, packing.bits
    made: Any  # of any shape: its arrays are replaced
    if isinstance(layer, nn.Embedding):
        made = nn.QuantizedEmbedding(size, size, group_size=size, bits=bits)
    else:
        made = nn.QuantizedLinear(size, size, bias=False, group_size=size, bits=bits)
    made.weight = packed(found, packing.bits)
    made.scales, made.biases = (mx.array(a).astype(SCALES) for a in (found.scales, found.biases))
    if "bias" in layer:
        made.bias = layer.bias
    mx.eval(made.parameters())
    return made


def _cast(layer: nn.Module, dtype: mx.Dtype) -> None:
    """The floats of `layer` in `dtype`, but for the scales of what is packed."""

    def cast(array: mx.array) -> mx.array:
        return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array

    for _, module in layer.named_modules():
        if not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
            own = {k: v for k, v in module.items() if isinstance(v, mx.array)}
            module.update(tree_map(cast, own))


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = module[int(name)] if isinstance(module, list) else module[name]
    return module
