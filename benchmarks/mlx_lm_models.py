"""mlx-lm's own models of a shape, with random 4-bit weights, to compare with."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from minicpm_mlx import Config


def kind_of(config: Config) -> str:
    """The module of mlx-lm that runs such a checkpoint."""
    if config.mla:
        return "minicpm3"
    return "llama" if config.scale_depth is None else "minicpm"


def mlx_lm_model(config: Config, dtype: mx.Dtype, kind: str) -> Any:
    """A model of `kind`: "llama", "minicpm" or "minicpm3".

    As "llama" also MiniCPM in llama format, whose weights hold muP.
    """
    from mlx_lm.models import llama, minicpm, minicpm3

    assert not config.num_experts, "mlx-lm has no mixture of MiniCPM"
    raw: dict[str, Any] = {
        name: getattr(config, name)
        for name in (
            *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "rope_theta"),
            *("max_position_embeddings", "scale_emb", "scale_depth", "dim_model_base"),
        )
    }
    # mlx-lm's minicpm takes no tied embedding that is stated.
    raw |= {"model_type": kind} | (
        {} if kind == "minicpm" else {"tie_word_embeddings": config.tie_word_embeddings}
    )
    if mla := config.mla:
        names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim")
        raw |= {name: getattr(mla, name) for name in names}
        ones = [1.0] * (mla.qk_rope_head_dim // 2)
        raw["rope_scaling"] = {
            **{"type": "longrope", "long_factor": ones, "short_factor": ones},
            "original_max_position_embeddings": config.max_position_embeddings,
        }
    module: Any = {"llama": llama, "minicpm": minicpm, "minicpm3": minicpm3}[kind]
    model = module.Model(module.ModelArgs.from_dict(raw))
    model.set_dtype(dtype)
    nn.quantize(model, group_size=64, bits=4)
    mx.eval(model.parameters())
    return model
