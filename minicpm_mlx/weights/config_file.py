"""config.json as this library writes it, with nothing left to a reader's defaults.

Readers differ in them: the published 2B config states no `model_type`, `rope_theta` or
`tie_word_embeddings`; its own code takes 10000 and true for the latter two, mlx-lm's MiniCPM a
million and false. And mlx-lm's MiniCPM reads no tied embedding that is packed. Its Granite, and
transformers' own, is the same architecture: embedding, residual and logit multipliers around a
Llama, tied or not. So that is the `model_type` of a dense MiniCPM; `architectures`, which this
library, llama.cpp and vLLM go by, and `auto_map` stay MiniCPM's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..model.config import Config

NEWER = {"rope_parameters": "rope_scaling", "dtype": "torch_dtype"}
"""Keys of transformers 5, and the older ones that every reader knows."""

GRANITE_KEYS = (
    "attention_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "residual_multiplier",
)


OWN = "minicpm_mlx"
"""The `model_type` of what mlx-lm's MiniCPM would load and compute otherwise: it refuses this."""


def written(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw`, with all that readers would otherwise take by default."""
    config = Config.from_dict(raw)
    torch_dtype = raw.get("torch_dtype", raw.get("dtype"))
    is_llama = config.dim_model_base is None  # a MiniCPM has it, stated or by default
    family = "Llama" if is_llama else "MiniCPM3" if config.mla else "MiniCPM"
    result = {
        **{key: value for key, value in raw.items() if key not in NEWER},
        **({} if torch_dtype is None else {"torch_dtype": torch_dtype}),
        "architectures": [f"{family}ForCausalLM"],
        **stated(config),
    }
    if config.mla:
        return result | {"model_type": "minicpm3", **asdict(config.mla)}
    if is_llama:
        return result | {"model_type": "llama", "head_dim": config.head_dim, "mlp_bias": False}
    return result | (_granite(config) if is_granite(config) else {"model_type": OWN})


def stated(config: Config) -> dict[str, Any]:
    """Keys that all families read, but with different defaults."""
    eos = config.eos_token_ids
    return {
        "attention_bias": config.attention_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos),
        "max_position_embeddings": config.max_position_embeddings,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": _rope_scaling(config),
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _rope_scaling(config: Config) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if scaling.kind != "longrope":  # no third key: older readers count them
        return {"type": scaling.kind, "factor": scaling.factor}
    return {
        "rope_type": scaling.kind,
        "type": scaling.kind,
        "short_factor": list(scaling.short_factor),
        "long_factor": list(scaling.long_factor),
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def is_granite(config: Config) -> bool:
    """Whether mlx-lm's Granite computes what this MiniCPM does."""
    is_plain = config.hidden_act == "silu" and not config.num_experts
    usual_heads = config.head_dim * config.num_attention_heads == config.hidden_size
    # Of a longrope mlx-lm takes the long factors for texts of every length.
    scaling = config.rope_scaling
    longrope = scaling is not None and scaling.kind == "longrope"
    return is_plain and usual_heads and not (longrope and config.rotation_threshold)


def _granite(config: Config) -> dict[str, Any]:
    return {
        "model_type": "granite",
        "attention_multiplier": config.head_dim**-0.5,
        "embedding_multiplier": config.scale_emb,
        "logits_scaling": config.logit_divisor,
        "residual_multiplier": config.residual_scale,
        "mlp_bias": False,
    }
