"""Memory of training: foretold, and what MLX held at most in the second step.

    python benchmarks/train_memory.py [--json results/NAME.json]

Sixteen settings of random models in float32: LoRA, DoRA and full training, vocabularies of 8,192 to
122,753, one to eight samples of 256 to 1,024 tokens, layers computed twice (as a CPU trains);
MiniCPM5's heads of a width of their own and MiniCPM3's latent attention among them.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import report

from minicpm_mlx.model.config import Config
from minicpm_mlx.train.lora import LoRAConfig

VOCABULARY = {
    **{"small": 8192, "wide": 122753, "demo": 49152, "deep": 32000},
    **{"wide heads": 32000, "latent": 32000},
}
SHAPES = {
    "small": (256, 768, 6, 8, 8),
    "wide": (288, 768, 4, 6, 6),
    "demo": (576, 1536, 8, 9, 3),
    "deep": (384, 1024, 12, 6, 6),
    "wide heads": (512, 1280, 6, 8, 2),
    "latent": (512, 1280, 6, 8, 8),
}
"""Hidden, feed-forward, layers, heads, key-value heads."""
MORE: dict[str, dict[str, Any]] = {
    "wide heads": {"head_dim": 128, "tie_word_embeddings": False},
    "latent": {
        **{"architectures": ["MiniCPM3ForCausalLM"], "rms_norm_eps": 1e-5},
        **{"q_lora_rank": 256, "kv_lora_rank": 128},
        **{"qk_nope_head_dim": 64, "qk_rope_head_dim": 32},
    },
}
"""What else its config states, by shape."""

SETTINGS: list[tuple[str, dict[str, Any], int, int]] = [
    ("small", {}, 2, 256),
    ("small", {}, 4, 512),
    ("small", {"kind": "full"}, 2, 256),
    ("small", {"rank": 32}, 8, 512),
    ("wide", {}, 2, 512),
    ("wide", {}, 4, 1024),
    ("demo", {}, 1, 1024),
    ("demo", {"layers": 4}, 2, 512),
    ("demo", {"kind": "dora", "rank": 16}, 2, 256),
    ("deep", {"rank": 64}, 2, 512),
    ("deep", {}, 4, 1024),
    ("deep", {"kind": "full"}, 1, 256),
    ("wide heads", {}, 2, 512),
    ("wide heads", {}, 1, 1024),
    ("latent", {}, 2, 512),
    ("latent", {}, 1, 1024),
]
"""Shape, method, samples, tokens in each."""


def main() -> None:
    options = report.options(__doc__, rounds=1).parse_args()
    found = report.Report()
    rows = found.record["rows"] = dict[str, list[float]]()
    print("| model | method | samples x tokens | foretold, GB | held, GB | ratio |")
    print("|---|---|---:|---:|---:|---:|")
    for shape, how, samples, tokens in SETTINGS:
        foretold, held = measured(config_of(shape), LoRAConfig(**how), samples, tokens)
        name = ", ".join(
            [how.get("kind", "lora"), *(f"{k} {v}" for k, v in how.items() if k != "kind")]
        )
        print(
            f"| {shape} | {name} | {samples} x {tokens} | {foretold:.3f} | {held:.3f} "
            f"| {foretold / held:.2f} |",
            flush=True,
        )
        rows[f"{shape} {name} {samples}x{tokens}"] = [foretold, held]
    ratios = [foretold / held for foretold, held in rows.values()]
    print(f"ratios from {min(ratios):.2f} to {max(ratios):.2f}")
    found.save(options.json)


def config_of(shape: str) -> Config:
    hidden, inner, layers, heads, shared = SHAPES[shape]
    return Config.from_dict(
        {
            "architectures": ["MiniCPMForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": shared,
            "vocab_size": VOCABULARY[shape],
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 256,
            **MORE.get(shape, {}),
        }
    )


def measured(config: Config, method: LoRAConfig, samples: int, tokens: int) -> tuple[float, float]:
    """GB foretold and held."""
    import mlx.core as mx

    from minicpm_mlx.model.transformer import Model
    from minicpm_mlx.train import cpu_kernels, lora
    from minicpm_mlx.train.data.samples import Sample
    from minicpm_mlx.train.memory import estimate_memory
    from minicpm_mlx.train.objectives import CrossEntropy
    from minicpm_mlx.train.planning import TrainingPlan
    from minicpm_mlx.train.trainer import Trainer

    gc.collect()
    mx.clear_cache()
    model = Model(config)
    mx.eval(model.parameters())
    lora.prepare_model(model, method)
    cpu_kernels.use_fast_kernels(model)
    mask = [False] + [True] * (tokens - 1)
    ids = mx.random.randint(0, config.vocab_size, (2 * samples, tokens)).tolist()
    plan = TrainingPlan(steps=2, batch_size=samples, checkpointing=True)
    folder = Path(tempfile.mkdtemp())
    texts: Any = [Sample(text, mask) for text in ids]
    trainer = Trainer(model, CrossEntropy(), plan, texts, [], folder)
    trainer._step()
    mx.reset_peak_memory()
    trainer._step()
    how = {"batch_size": samples, "length": tokens, "checkpointing": True}
    foretold = estimate_memory(config, method, **how, dtype="float32")  # type: ignore[arg-type]
    return foretold.total / 1e9, mx.get_peak_memory() / 1e9


if __name__ == "__main__":
    main()
