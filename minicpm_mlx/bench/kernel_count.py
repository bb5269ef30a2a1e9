"""Counts the kernels that a GPU runs for a decode step, on any machine.

Builds the step's graph as on a GPU without computing it. Each operation is a kernel, except views
of memory (reshape, transpose, slice, ...), which run none. MLX's fast operations (norm, rotation,
attention) count as one each, and so do kernels of our own and operations that mx.compile fuses.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from .. import device
from ..engine import Sampler, Sampling, Session
from ..model import kernels as kernel_forms
from ..model.config import Config
from ..model.config_sections import Quantization
from ..model.fused import fuse
from ..model.packing import quantize
from ..model.transformer import Model

VIEWS = (
    *("AsStrided", "Broadcast", "BroadcastAxes", "Copy", "Depends", "ExpandDims", "Flatten"),
    *("NumberOfElements", "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose"),
    "Unflatten",
)
"""Operations that run no kernel."""

_NODE = re.compile(r'label ="([A-Za-z]\w*)", shape=rectangle')


def count(step: Callable[[], Sequence[mx.array]]) -> Counter[str]:
    """Kernels by name that a GPU would run to compute the arrays that `step` returns."""
    kernels: Counter[str] = Counter()
    with _count_fast_operations(kernels) as inputs, _as_on_a_gpu():
        return kernels + _count_graph([*step(), *inputs])


def _count_graph(outputs: Sequence[mx.array]) -> Counter[str]:
    """Operations by name in the unevaluated graph of these arrays, without views."""
    with tempfile.NamedTemporaryFile(suffix=".dot") as file:
        mx.export_to_dot(file.name, *outputs)
        nodes = Counter(_NODE.findall(Path(file.name).read_text(encoding="utf-8")))
    return Counter({name: n for name, n in nodes.items() if name not in VIEWS})


@contextmanager
def _count_fast_operations(kernels: Counter[str]) -> Iterator[list[mx.array]]:
    """Counts each fast operation as one kernel; on a CPU it would be dozens.

    Yields a list of their inputs, which the graph of the outputs no longer contains.
    """
    inputs: list[mx.array] = []

    def count_one(name: str, *arrays: mx.array | None, shape: tuple[int, ...]) -> mx.array:
        present = [array for array in arrays if array is not None]
        inputs.extend(present)
        kernels[name] += 1
        result = mx.zeros(shape, present[-1].dtype)
        mx.eval(result)
        return result

    def norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
        return count_one("RMSNorm", weight, x, shape=x.shape)

    def add_norm(x: mx.array, delta: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        normed = count_one("AddNorm", weight, delta, x, shape=x.shape)
        return x, normed

    def rope(x: mx.array, *_: Any, **__: Any) -> mx.array:
        return count_one("RoPE", x, shape=x.shape)

    def attention(q: mx.array, k: mx.array, v: mx.array, **_: Any) -> mx.array:
        return count_one("Attention", k, v, q, shape=(*q.shape[:-1], v.shape[-1]))

    def dequantize(w: mx.array, scales: mx.array, biases: Any = None, **options: Any) -> mx.array:
        shape = (*w.shape[:-1], w.shape[-1] * 32 // options["bits"])
        return count_one("Dequantize", w, biases, scales, shape=shape)

    fast: Any = mx.fast
    with (
        patch.object(fast, "rms_norm", norm),
        patch.object(fast, "rope", rope),
        patch.object(kernel_forms, "add_norm", lambda *_: add_norm),
        patch.object(fast, "scaled_dot_product_attention", attention),
        patch.object(mx, "dequantize", dequantize),
    ):
        yield inputs


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    with patch.object(device, "on_cpu", lambda: False):
        mx.enable_compile()
        try:
            yield
        finally:
            device.select()


def kernels_per_token(config: Config) -> int:
    """Kernels of a greedy token, as `decode_step` counts them."""
    layer = (20 if config.mla else 11) + (13 if config.num_experts else 0)
    return 13 + config.num_hidden_layers * layer


def decode_step(config: dict[str, Any], sampling: Sampling | None = None) -> Counter[str]:
    """Kernels for one token, by default greedy, of a fused model of this config in 4 bits."""
    model = Model(Config.from_dict(config))
    model.set_dtype(mx.float16)
    quantize(model, Quantization(bits=4, group_size=64))
    kernels: Counter[str] = Counter()
    # A fused model keeps the operations that it finds when it is built.
    with _count_fast_operations(kernels) as inputs, _as_on_a_gpu():
        fused = fuse(model)
        session = Session(fused.config)
        sampler = Sampler(sampling or Sampling(), [1], fused.config.vocab_size)
        mx.eval(sampler.arrays)
        next(session.prefill(fused, [1, 2, 3], length=3, chunk=3))
        kernels.clear()
        inputs.clear()
        logits = fused.logits(fused.hidden(mx.array([[5]]), session.cache))
        token = sampler(logits[:, -1])
        states = [array for layer in session.cache for array in layer.state]
        return kernels + _count_graph([token, *sampler.arrays, *states, *inputs])
