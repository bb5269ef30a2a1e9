"""Models of a published shape with random 4-bit weights, to measure without a download."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx

from .. import device, memory
from ..errors import InvalidArgumentError
from ..loading.tuning import model_key, own_kernels, tuning_for
from ..model.config import Config
from ..model.config_sections import Quantization
from ..model.fused import FusedModel, fuse
from ..model.kernels.cpu_gemv import split_matrices
from ..model.layout import Layout, apply_layout
from ..model.modules import Pace
from ..model.packing import apply_packing, dequantize
from ..model.transformer import Model
from ..weights.load import parameters

PACKING = Quantization(bits=4, group_size=64)

COMMON = {
    **{"architectures": ["MiniCPMForCausalLM"], "max_position_embeddings": 4096},
    **{"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
}

MINICPM5 = {
    **{"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 131072},
    **{"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128},
    **{"vocab_size": 130560, "tie_word_embeddings": False, "rope_theta": 5e6},
}

MINICPM_2B = {
    **COMMON,
    "hidden_size": 2304,
    "intermediate_size": 5760,
    "num_attention_heads": 36,
    "num_hidden_layers": 40,
    "vocab_size": 122753,
}

SHAPES: dict[str, dict[str, Any]] = {
    "2b-shape": MINICPM_2B,
    # 128k, and the llama format, which has muP in the weights: nothing that is measured differs.
    "2b-untied-shape": {**MINICPM_2B, "tie_word_embeddings": False},
    "moe-8x2b-shape": {**MINICPM_2B, "num_experts": 8, "num_experts_per_tok": 2},
    "1b-shape": {
        **COMMON,
        "hidden_size": 1536,
        "intermediate_size": 3840,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "num_hidden_layers": 52,
        "vocab_size": 73440,
    },
    "5-1b-shape": {
        **MINICPM5,
        "hidden_size": 1536,
        "intermediate_size": 4608,
        "num_hidden_layers": 24,
    },
    "5-2b-shape": {
        **MINICPM5,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 42,
    },
    "4-8b-shape": {
        **COMMON,
        "max_position_embeddings": 32768,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "num_hidden_layers": 32,
        "vocab_size": 73448,
        "tie_word_embeddings": False,
    },
    "4-0.5b-shape": {
        **COMMON,
        "max_position_embeddings": 32768,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_hidden_layers": 24,
        "vocab_size": 73448,
    },
    "3-4b-shape": {
        **COMMON,
        "architectures": ["MiniCPM3ForCausalLM"],
        "max_position_embeddings": 32768,
        "hidden_size": 2560,
        "intermediate_size": 6400,
        "num_attention_heads": 40,
        "num_hidden_layers": 62,
        "vocab_size": 73448,
        "q_lora_rank": 768,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "rms_norm_eps": 1e-5,
    },
    "demo-shape": {
        **COMMON,
        "max_position_embeddings": 8192,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
    },
}
"""Config by name; measurements may exceed the trained context."""


def packed_config(shape: str) -> Config:
    """The config of that shape in 4 bits, groups of 64."""
    return replace(Config.from_dict(SHAPES[shape]), quantization=PACKING)


def random_model(
    shape: str | Config, dtype: str | mx.Dtype | None = None, layout: Layout | None = None
) -> FusedModel:
    """A fused model of that shape with random weights in 4 bits, groups of 64.

    InvalidArgumentError for an unknown shape, or one that does not fit in memory.
    """
    if isinstance(shape, str) and shape not in SHAPES:
        raise InvalidArgumentError(f"expected one of {', '.join(SHAPES)}, got {shape!r}")
    config = Config.from_dict(SHAPES[shape]) if isinstance(shape, str) else shape
    packed = replace(config, quantization=PACKING)
    memory.check_fits(memory.estimate(packed, dtype=dtype, context=256))
    compute = device.choose_dtype(mx.bfloat16, dtype)
    model = _packed(config)
    model.load_weights(list(random_arrays(config, compute).items()))
    fused = fuse(model)
    if (dense := device.unpack_to(compute, memory.parameter_count(config))) is not None:
        dequantize(fused, dense)
        mx.eval(fused.parameters())
    else:
        apply_layout(fused, layout or Layout())
    split_matrices(fused)
    return fused


def tuned_model(shape: str, dtype: str | mx.Dtype | None = None) -> FusedModel:
    """As `random_model`, with the settings that are kept for it, or that the environment states."""
    key = model_key(packed_config(shape), None)
    tuning = tuning_for(device.chip(), key, device.mlx_version())
    layout = Layout(wide=tuning.wide, group_size=tuning.group_size)
    with own_kernels(tuning):
        model = random_model(shape, dtype, layout)
    model.pace = Pace(most_prefill=tuning.prefill_chunk, draft_costs=tuning.draft_costs)
    return model


def random_arrays(config: Config, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Random tensors of a 4-bit checkpoint by name, floats in `dtype`."""
    mx.random.seed(0)
    arrays = parameters(_packed(config)).items()
    return {name: _random(name, array, dtype) for name, array in arrays}


def _packed(config: Config) -> Model:
    """A model in 4 bits, groups of 64, but for routers; its arrays are not evaluated."""
    model = Model(config)
    matrices = [name for name, array in parameters(model).items() if array.ndim == 2]
    paths = [name.removesuffix(".weight") for name in matrices if ".mlp.gate." not in name]
    apply_packing(model, dict.fromkeys(paths, PACKING))
    return model


def _random(name: str, array: mx.array, dtype: mx.Dtype) -> mx.array:
    if array.dtype == mx.uint32:
        return mx.random.randint(0, 2**31 - 1, array.shape, mx.uint32)
    if name.endswith(".scales"):  # small, so that 40 layers do not overflow float16
        return mx.full(array.shape, 0.004, dtype)
    if name.endswith(".biases"):
        return mx.full(array.shape, -0.03, dtype)
    return mx.ones(array.shape, dtype)
