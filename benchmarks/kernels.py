"""Kernels a GPU runs for one token of each shape in 4 bits: ours, and mlx-lm's models.

    python benchmarks/kernels.py [--json results/NAME.json]

Counted, not timed (see minicpm_mlx/bench/kernel_count.py); the same on every machine. The widths
are small, since only the number of layers and the kind of each matter. mlx-lm's step takes the
logarithm of the softmax and then the largest, as its generate_step does. MiniCPM-2B is compared
with its llama format as well, and drawn with its card's sampling. All other tokens are greedy.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import report
from mlx_lm_models import kind_of, mlx_lm_model

from minicpm_mlx import Config, Sampling
from minicpm_mlx.bench.shapes import SHAPES

CARD = Sampling(temperature=0.5, top_p=0.8, repetition_penalty=1.02)
"""MiniCPM-2B's settings."""

NARROW = {"hidden_size": 256, "intermediate_size": 384, "vocab_size": 1024}
NARROW |= {"num_attention_heads": 4}


def narrow(shape: str) -> dict[str, Any]:
    """A config of as many layers of the same kinds."""
    raw = SHAPES[shape] | NARROW
    raw |= {"num_key_value_heads": 2} if "num_key_value_heads" in raw else {}
    return raw | ({"q_lora_rank": 192, "kv_lora_rank": 128} if "q_lora_rank" in raw else {})


def ours(shape: str = "2b-shape", sampling: Sampling | None = None) -> Counter[str]:
    from minicpm_mlx.bench.kernel_count import decode_step

    return decode_step(narrow(shape), sampling)


def theirs(kind: str, shape: str = "2b-shape") -> Counter[str]:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from minicpm_mlx.bench.kernel_count import count

    model = mlx_lm_model(Config.from_dict(narrow(shape)), mx.float16, kind)
    cache: Any = make_prompt_cache(model)
    mx.eval(model(mx.array([[1, 2, 3]]), cache=cache), [layer.state for layer in cache])

    def step() -> list[mx.array]:
        logits = model(mx.array([[5]]), cache=cache)[:, -1, :]
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        token = mx.argmax(logprobs, axis=-1)
        return [
            token,
            logprobs,
            *(array for layer in cache for array in (layer.keys, layer.values)),
        ]

    return count(step)


def main() -> None:
    options = report.options(__doc__, rounds=1).parse_args()
    record = report.Report()
    for shape, raw in SHAPES.items():
        own = ours(shape)
        record.add(f"{shape}, minicpm-mlx", [sum(own.values())], "kernels")
        if shape == "2b-shape":
            print(dict(own.most_common()))
            sampled = ours(shape, CARD)
            record.add(f"{shape}, minicpm-mlx, sampled", [sum(sampled.values())], "kernels")
        kinds = [] if "num_experts" in raw else [kind_of(Config.from_dict(raw))]
        for kind in [*kinds, *["llama"] * (shape == "2b-shape")]:
            counted = theirs(kind, shape)
            fewer = 100 * (1 - sum(own.values()) / sum(counted.values()))
            record.add(f"{shape}, mlx-lm {kind}", [sum(counted.values())], "kernels")
            record.add(f"{shape}, fewer than {kind}", [fewer], "%")
    record.save(options.json)


if __name__ == "__main__":
    main()
