"""Kernels a GPU runs for one greedy token of MiniCPM-2B in 4 bits: ours, and mlx-lm's two models.

    python benchmarks/kernels.py [--json results/NAME.json]

Counted, not timed (see minicpm_mlx/bench/kernel_count.py); the same on every machine. The widths
are small, since only the number of layers and the kind of each matter. mlx-lm's step takes the
logarithm of the softmax and then the largest, as its generate_step does.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import report

LAYERS = 40
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": LAYERS,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
}
MUP = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}


def ours() -> Counter[str]:
    from minicpm_mlx.bench.kernel_count import decode_step

    return decode_step({"architectures": ["MiniCPMForCausalLM"], **SHAPE, **MUP})


def theirs(kind: str) -> Counter[str]:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models import llama, minicpm
    from mlx_lm.models.cache import make_prompt_cache

    from minicpm_mlx.bench.kernel_count import count

    module: Any = {"llama": llama, "minicpm": minicpm}[kind]
    more = MUP if kind == "minicpm" else {"tie_word_embeddings": True}
    model = module.Model(module.ModelArgs(model_type=kind, **SHAPE, **more))
    model.set_dtype(mx.float16)
    nn.quantize(model, group_size=64, bits=4)
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
    record = report.Report(layers=LAYERS)
    own = ours()
    record.add("minicpm-mlx", [sum(own.values())], "kernels")
    for kind in ("llama", "minicpm"):
        counted = theirs(kind)
        record.add(f"mlx-lm {kind}", [sum(counted.values())], "kernels")
        record.add(
            f"fewer than {kind}", [100 * (1 - sum(own.values()) / sum(counted.values()))], "%"
        )
        print(dict(counted.most_common()))
    print(dict(own.most_common()))
    record.save(options.json)


if __name__ == "__main__":
    main()
