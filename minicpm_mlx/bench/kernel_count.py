"""How many kernels a GPU runs for a decode step, counted on any machine.

The step's graph is built as on a GPU and never computed. Each operation in it is a kernel, but for
those that only look at memory otherwise (reshape, transpose, slice, ...), which run none. MLX's
fast operations (norm, rotation, attention), which are one kernel each on a GPU, count as one, and
so does what mx.compile joins.
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
    """Kernels by name that a GPU would run to compute what `step` returns."""
    found: Counter[str] = Counter()
    with _one_kernel_each(found) as inside, _as_on_a_gpu():
        outputs = [*step(), *inside]
        with tempfile.NamedTemporaryFile(suffix=".dot") as file:
            mx.export_to_dot(file.name, *outputs)
            found.update(_NODE.findall(Path(file.name).read_text(encoding="utf-8")))
    return Counter({name: n for name, n in found.items() if name not in VIEWS})


@contextmanager
def _one_kernel_each(found: Counter[str]) -> Iterator[list[mx.array]]:
    """Counts each fast operation as one in `found`; on a CPU they would be drawn as dozens.

    What it yields are their inputs, which the graph of the outputs no longer leads to.
    """
    inside: list[mx.array] = []

    def note(name: str, *inputs: mx.array | None, like: tuple[int, ...]) -> mx.array:
        arrays = [array for array in inputs if array is not None]
        inside.extend(arrays)
        found[name] += 1
        result = mx.zeros(like, arrays[-1].dtype)
        mx.eval(result)
        return result

    def norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
        return note("RMSNorm", weight, x, like=x.shape)

    def rope(x: mx.array, *_: Any, **__: Any) -> mx.array:
        return note("RoPE", x, like=x.shape)

    def attention(q: mx.array, k: mx.array, v: mx.array, **_: Any) -> mx.array:
        return note("Attention", k, v, q, like=q.shape)

    def dequantize(w: mx.array, scales: mx.array, biases: Any = None, **how: Any) -> mx.array:
        shape = (*w.shape[:-1], w.shape[-1] * 32 // how["bits"])
        return note("Dequantize", w, biases, scales, like=shape)

    fast: Any = mx.fast
    with (
        patch.object(fast, "rms_norm", norm),
        patch.object(fast, "rope", rope),
        patch.object(fast, "scaled_dot_product_attention", attention),
        patch.object(mx, "dequantize", dequantize),
    ):
        yield inside


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    with patch.object(device, "on_cpu", lambda: False):
        mx.enable_compile()
        try:
            yield
        finally:
            device.select()


def decode_step(config: dict[str, Any]) -> Counter[str]:
    """Kernels for one greedy token of a model of this config in its inference form, in 4 bits."""
    model = Model(Config.from_dict(config))
    model.set_dtype(mx.float16)
    quantize(model, Quantization(bits=4, group_size=64))
    with _as_on_a_gpu():
        fused = fuse(model)
    session = Session(fused.config)
    sampler = Sampler(Sampling(), [1], fused.config.vocab_size)
    next(session.prefill(fused, [1, 2, 3], length=3, chunk=3))

    def step() -> list[mx.array]:
        logits = fused.logits(fused.hidden(mx.array([[5]]), session.cache))
        token = sampler(logits[:, -1])
        return [token, *(part for layer in session.cache for part in layer.state)]

    return count(step)
