"""DWQ: trains scales and biases so that the model predicts what it did before rounding.

The training loop is mlx-lm's; codes stay unchanged. Both models and the gradients are in memory:
this is the only method that needs more than a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers

from .. import device
from ..model.modules import replace_module
from ..model.packing import dequantize
from ..model.transformer import Model
from ..weights.checkpoint import Checkpoint
from ..weights.load import assemble, parameters

RATE = 1e-5
"""Learning rate of Adam."""

LENGTH = 256
"""Most tokens of a step."""


class CodedLinear(nn.Module):
    """A packed matrix with its codes in float32, by which a CPU multiplies many times faster."""

    def __init__(self, layer: Any):
        super().__init__()
        self.bits, self.group_size, self.mode = layer.bits, layer.group_size, layer.mode
        self.weight = layer.weight  # mlx-lm counts parameters by it
        self.scales, self.biases = (layer[n].astype(mx.float32) for n in ("scales", "biases"))
        ones, zeros = mx.ones_like(self.scales), mx.zeros_like(self.scales)
        # Scale 1 and bias 0 unpack to the codes themselves.
        options = {"group_size": layer.group_size, "bits": layer.bits}
        codes = mx.dequantize(layer.weight, ones, zeros, **options)
        self._codes = codes.reshape(*self.scales.shape, -1)  # (out, groups, group)

    def __call__(self, x: mx.array) -> mx.array:
        return x @ _dense(self._codes, self.scales, self.biases).T


class CodedEmbedding(CodedLinear):
    def __call__(self, ids: mx.array) -> mx.array:
        return _dense(self._codes[ids], self.scales[ids], self.biases[ids])

    def as_linear(self, x: mx.array) -> mx.array:
        return super().__call__(x)


def _dense(codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    return (codes * scales[..., None] + biases[..., None]).flatten(-2)


def learn_scales(
    source: Checkpoint,
    smaller: Checkpoint,
    texts: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    progress: Callable[[str], object] = lambda _: None,
) -> dict[str, mx.array]:
    """Scales and biases of `smaller`, by name, trained on `texts` towards `source`."""
    from mlx_lm.quant.dwq import dwq_quantize

    teacher = assemble(source.config, dict(source.tensors), mx.float32)
    dequantize(teacher, mx.float32)
    student = assemble(smaller.config, dict(smaller.tensors), mx.float32)
    if device.on_cpu():
        _as_codes(student)
    student.freeze()
    length = min(LENGTH, len(texts[0]))
    data = [
        (list(text[at : at + length]), 0)
        for text in texts
        for at in range(0, len(text) - length + 1, length)
    ]
    steps = len(data)

    def target(batch: mx.array, step: int, split: str) -> mx.array:
        if split == "train":
            progress(f"step {step + 1} of {steps}")
        return teacher(batch)

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        dwq_quantize(
            student,
            target,
            optimizers.Adam(RATE, bias_correction=True),
            data,
            data[:1],
            batch_size=1,
            max_seq_length=length,
            seed=seed,
            dtype=mx.float32,
        )
    trained = {
        name: array
        for name, array in parameters(student).items()
        if name.endswith((".scales", ".biases"))
    }
    mx.eval(trained)
    return trained


def _as_codes(model: Model) -> None:
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.QuantizedLinear):
            replace_module(model, path, CodedLinear(module))
        elif isinstance(module, nn.QuantizedEmbedding):
            replace_module(model, path, CodedEmbedding(module))
