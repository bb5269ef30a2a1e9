"""Host time of a decode step: seconds to build its graph, without computing it; ours and mlx-lm's.

    python benchmarks/host_time.py [--shape 2b-shape] [--rounds 60] [--json results/NAME.json]

Built as on a GPU, on any machine: each of MLX's fast operations (norm, rotation, attention) is
stood for by one operation that takes as many arguments, and our own kernel by a call with its
arguments and two operations. The widths are small: host time depends on the layers alone. Greedy,
16 tokens in the cache. The models take turns; times are the thread's own, and ratios are of each
round, so that they mean something on a busy machine too.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import report
from kernels import narrow
from mlx_lm_models import mlx_lm_model

from minicpm_mlx import Config, device
from minicpm_mlx.bench.shapes import SHAPES, random_model
from minicpm_mlx.engine import KVCache, Sampler, Sampling
from minicpm_mlx.model.kernels import own

PROMPT = mx.array([[*range(1, 17)]])
TOKEN = mx.array([5])


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    def norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
        return mx.multiply(x, weight)

    def rope(x: mx.array, dims: int, **_: Any) -> mx.array:
        return mx.negative(x)

    def attention(q: mx.array, k: mx.array, v: mx.array, **_: Any) -> mx.array:
        return mx.negative(q)

    def dequantize(w: mx.array, scales: mx.array, biases: mx.array, **_: Any) -> mx.array:
        return mx.zeros((*w.shape[:-1], w.shape[-1] * 8), scales.dtype)

    def kernel(**_: Any) -> Callable[..., list[mx.array]]:
        def run(*, inputs: list[mx.array], **_: Any) -> list[mx.array]:
            x, delta, weight = inputs
            return [mx.add(x, delta), mx.multiply(x, weight)]

        return run

    fast: Any = mx.fast
    with ExitStack() as stack:
        for owner, name, replacement in (
            (fast, "rms_norm", norm),
            (fast, "rope", rope),
            (fast, "scaled_dot_product_attention", attention),
            (fast, "metal_kernel", kernel),
            (mx, "dequantize", dequantize),
            (mx.metal, "is_available", lambda: True),
            (own, "add_norm_fault", lambda *_: None),
            (device, "on_cpu", lambda: False),
        ):
            stack.enter_context(patch.object(owner, name, replacement))
        mx.enable_compile()
        try:
            yield
        finally:
            mx.disable_compile()


Step = tuple[Callable[[], Sequence[mx.array]], Callable[[], None]]
"""Builds a step's graph; rewinds the cache to before it."""


def fresh(arrays: list[mx.array]) -> list[mx.array]:
    """The same arrays as objects of their own: writing to a slice changes an object."""
    copies = [mx.array(array) for array in arrays]
    mx.eval(copies)
    return copies


def ours(config: Config) -> Step:
    model = random_model(config, "float16")
    cache = [KVCache() for _ in model.layers]
    mx.eval(model(PROMPT, cache), [layer.state for layer in cache])
    kept = [[*layer.keys, *layer.values] for layer in cache]
    sampler = Sampler(Sampling(), [1], config.vocab_size)

    def step() -> Sequence[mx.array]:
        hidden = model.hidden(TOKEN[None], cache)
        return [sampler(model.logits(hidden)[:, -1])]

    def rewind() -> None:
        for layer, arrays in zip(cache, kept, strict=True):
            keys, values = fresh(arrays)
            layer.keys, layer.values, layer.offset = (keys,), (values,), PROMPT.size
        # It keeps logits and a token: without their values, a whole graph that it would free.
        sampler.past.clear()
        sampler.last = None

    return step, rewind


def theirs(config: Config, kind: str) -> Step:
    from mlx_lm.models.cache import make_prompt_cache

    model = mlx_lm_model(config, mx.float16, kind)
    cache: Any = make_prompt_cache(model)
    mx.eval(model(PROMPT, cache=cache), [layer.state for layer in cache])
    kept = [(layer.keys, layer.values) for layer in cache]

    def step() -> Sequence[mx.array]:
        logits = model(TOKEN[None], cache=cache)[:, -1, :]
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return [mx.argmax(logprobs, axis=-1), logprobs]

    def rewind() -> None:
        for layer, arrays in zip(cache, kept, strict=True):
            layer.keys, layer.values = fresh(arrays)
            layer.offset = PROMPT.size

    return step, rewind


def main() -> None:
    parser = report.options(__doc__, rounds=60)
    parser.add_argument("--shape", default="2b-shape", choices=SHAPES)
    options = parser.parse_args()
    config = Config.from_dict(narrow(options.shape))
    record = report.Report(shape=options.shape)
    seconds: dict[str, list[float]] = {}
    with as_on_a_gpu():
        kinds = ["llama"] if config.scale_depth is None else ["minicpm", "llama"]
        steps = {"minicpm-mlx": ours(config)}
        steps |= {f"mlx-lm {kind}": theirs(config, kind) for kind in kinds}
        gc.disable()
        for _ in range(options.rounds):
            for name, (step, rewind) in steps.items():
                rewind()
                start = time.thread_time()
                built = step()
                seconds.setdefault(name, []).append(1000 * (time.thread_time() - start))
                del built
            gc.collect()
    for name, values in seconds.items():
        record.add(name, values, "ms")
    own_times = seconds.pop("minicpm-mlx")
    for name, values in seconds.items():
        pairs = zip(own_times, values, strict=True)
        record.add(f"ours of {name}", [one / other for one, other in pairs], "")
    record.save(options.json)


if __name__ == "__main__":
    main()
