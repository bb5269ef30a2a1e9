"""A model's shape and constants: GGUF's keys and config.json's.

llama.cpp's converter writes a MiniCPM's constants as what they come to: `embedding_scale` is
scale_emb, `residual_scale` scale_depth / sqrt(layers), `logit_scale` hidden_size / dim_model_base,
by which the logits are divided. Older files of that architecture lack them and mean the 2B's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from ...arguments import printable, shown
from ...errors import ConfigError, InvalidArgumentError
from ...model.config import Config
from ...model.config_sections import FOLDED
from .header import GgufFile
from .tensor_names import ROPE_FACTORS

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "minicpm": "MiniCPMForCausalLM",
    "minicpm3": "MiniCPM3ForCausalLM",
}
"""GGUF's architectures this library reads; others order the rows of q and k anew."""

MUP = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 256}
"""MiniCPM 2B's and MiniCPM3's constants, which older files and all of minicpm3 leave out."""

SHAPE = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_hidden_layers": "block_count",
}
"""Whole numbers that every file states."""

EPS, KV_HEADS = "attention.layer_norm_rms_epsilon", "attention.head_count_kv"
HEAD_WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
MLA_RANKS = {"q_lora_rank": "attention.q_lora_rank", "kv_lora_rank": "attention.kv_lora_rank"}
ROPE_BASE, ROPE_TYPE = "rope.freq_base", "rope.scaling.type"
ROPE_FACTOR, ROPE_TRAINED = "rope.scaling.factor", "rope.scaling.original_context_length"
MUP_SCALES = ("embedding_scale", "residual_scale", "logit_scale")


def config_of(file: GgufFile) -> dict[str, Any]:
    """config.json for a GGUF file. Raises ConfigError for what this library does not run."""
    if (kind := file.metadata.get("general.type", "model")) != "model":
        advice = (
            "; llama.cpp puts it on with --lora, and --adapter reads what mlx-lm and PEFT write"
            if kind == "adapter"
            else ""
        )
        raise ConfigError(
            f"{file.path}: expected a model, found {printable(kind)} (general.type){advice}"
        )
    found = _ModelKeys(file)
    if found.get("expert_count", 0):
        raise ConfigError(
            f"{file.path}: a mixture of experts, which is not read from GGUF; load the model's "
            "own folder or repository"
        )
    raw: dict[str, Any] = {
        "architectures": [FAMILIES[found.architecture]],
        "model_type": found.architecture,
        "_name_or_path": printable(file.metadata.get("general.name", file.path.stem)),
        **_ends(file.metadata),
        "hidden_act": "silu",
        **{name: found.whole(key) for name, key in SHAPE.items()},
        "rms_norm_eps": found.number(EPS),
        "rope_theta": found.number(ROPE_BASE, 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "float32",
        "vocab_size": _vocabulary(file),
    }
    raw["num_key_value_heads"] = found.whole(KV_HEADS, raw["num_attention_heads"])
    raw |= _rotation(found)
    raw |= _mla(found) if found.architecture == "minicpm3" else _head_width(found, raw)
    if any(name.endswith("attn_q.bias") for name in file.tensors):
        raw["attention_bias"] = True
    if found.architecture != "llama":
        raw |= _mup(found, raw)
    elif (way := found.get(f"{FOLDED}.format")) is not None:
        scales = {name: found.number(f"{FOLDED}.{name}") for name in ("scale_emb", "scale_depth")}
        base = found.whole(f"{FOLDED}.dim_model_base")
        raw[FOLDED] = {"format": way, **scales, "dim_model_base": base}
    return raw


class _ModelKeys:
    """A file's keys under its architecture, each checked as it is read."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        name = file.metadata.get("general.architecture")
        if not isinstance(name, str) or name not in FAMILIES:
            raise ConfigError(
                f"{file.path}: general.architecture is {printable(name)}; expected "
                f"{' or '.join(FAMILIES)}"
            )
        self.architecture = name

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.architecture}.{key}", default)

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or not 0 < value < 2**31:
            raise self.wrong(key, "a whole number above 0", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise self.wrong(key, "a number above 0", value)
        return shortest(float(value))

    def wrong(self, key: str, expected: str, value: object) -> ConfigError:
        return ConfigError(
            f"{self.file.path}: {self.architecture}.{key} must be {expected}, "
            f"got {'nothing' if value is None else printable(shown(value))}"
        )


def shortest(value: float) -> float:
    """The shortest decimal that is the same in float32, which is what GGUF keeps: 1e-5, not
    9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _ends(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token_id and eos_token_id, one id or several."""
    found: dict[str, Any] = {"bos_token_id": metadata.get("tokenizer.ggml.bos_token_id")}
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    # A damaged file may hold lists here, which cannot be keys of a dict.
    eos = [id for n, id in enumerate(ids) if id is not None and id not in ids[:n]]
    return found | ({"eos_token_id": eos[0] if len(eos) == 1 else eos} if eos else {})


def _vocabulary(file: GgufFile) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ConfigError(f"{file.path}: there is no token_embd.weight; is it a language model?")
    return embedding.shape[0]


def _head_width(found: _ModelKeys, raw: Mapping[str, Any]) -> dict[str, int]:
    """head_dim, where it does not follow from the other sizes."""
    usual = raw["hidden_size"] // raw["num_attention_heads"]
    width = found.whole(HEAD_WIDTHS[0], usual)
    for key in HEAD_WIDTHS:
        if found.whole(key, width) != width:
            raise ConfigError(
                f"{found.file.path}: {key} is {found.get(key)} and heads are {width} wide; "
                "heads that are rotated in part, or have values of another width, are not supported"
            )
    exact = usual * raw["num_attention_heads"] == raw["hidden_size"]
    return {} if width == usual and exact else {"head_dim": width}


def _mla(found: _ModelKeys) -> dict[str, int]:
    """Widths of latent attention."""
    width, rope = found.whole(HEAD_WIDTHS[0]), found.whole(HEAD_WIDTHS[2])
    if rope >= width:
        raise found.wrong(HEAD_WIDTHS[2], f"below {HEAD_WIDTHS[0]} ({width})", rope)
    widths = {name: found.whole(key) for name, key in MLA_RANKS.items()}
    widths |= {"qk_nope_head_dim": width - rope, "qk_rope_head_dim": rope}
    if found.get(HEAD_WIDTHS[1]) is not None:  # else hidden_size / heads
        widths["v_head_dim"] = found.whole(HEAD_WIDTHS[1])
    return widths


def _rotation(found: _ModelKeys) -> dict[str, Any]:
    kind = found.get(ROPE_TYPE, "none")
    if kind == "none":
        return {}
    if kind == "linear":
        return {"rope_scaling": {"type": "linear", "factor": found.number(ROPE_FACTOR)}}
    if kind != "longrope":
        raise ConfigError(
            f"{found.file.path}: {ROPE_TYPE} is {printable(kind)}; expected none, linear or "
            "longrope"
        )
    factors = {}
    for name, key in ROPE_FACTORS.items():
        tensor = found.file.tensors.get(name)
        if tensor is None or tensor.kind != "F32" or len(tensor.shape) != 1:
            raise ConfigError(f"{found.file.path}: longrope needs the numbers {name} in F32")
        factors[key] = [shortest(f) for f in tensor.raw.reshape(-1).view("<f4").tolist()]
    trained = found.whole(ROPE_TRAINED, found.whole(SHAPE["max_position_embeddings"]))
    return {
        "rope_scaling": {"type": "longrope", **factors, "original_max_position_embeddings": trained}
    }


def _mup(found: _ModelKeys, raw: Mapping[str, Any]) -> dict[str, Any]:
    """scale_emb, scale_depth and dim_model_base, as config.json has them."""
    values = dict(MUP)
    if found.get("embedding_scale") is not None:
        values["scale_emb"] = found.number("embedding_scale")
    if found.get("residual_scale") is not None:
        root = math.sqrt(raw["num_hidden_layers"])
        values["scale_depth"] = _undone(found.number("residual_scale"), root)
    if found.get("logit_scale") is not None:
        divisor = found.number("logit_scale")
        base = round(raw["hidden_size"] / divisor)
        if base < 1 or not math.isclose(raw["hidden_size"] / base, divisor, rel_tol=1e-6):
            raise found.wrong(
                "logit_scale", f"hidden_size ({raw['hidden_size']}) over a whole number", divisor
            )
        values["dim_model_base"] = base
    return values


def _undone(quotient: float, divisor: float) -> float:
    """The shortest number that over `divisor` is `quotient` in float32: 1.4, not 1.3999999."""
    exact = quotient * divisor
    for digits in range(1, 17):
        guess = float(f"{exact:.{digits}g}")
        if np.float32(guess / divisor) == np.float32(quotient):
            return guess
    return exact


def keys_of(config: Config) -> dict[str, Any]:
    """GGUF's keys for a model, without their architecture, which `architecture_of` names.

    Whole numbers and floats are written as such. Raises InvalidArgumentError for what llama.cpp
    does not run, or not rightly.
    """
    _check(config)
    keys: dict[str, Any] = {key: getattr(config, name) for name, key in SHAPE.items()}
    widths = (config.head_dim, config.value_dim, config.rope_dim)
    keys |= dict(zip(HEAD_WIDTHS, widths, strict=True))
    if config.mla:
        keys |= {key: getattr(config.mla, name) for name, key in MLA_RANKS.items()}
    keys |= {
        KV_HEADS: config.num_key_value_heads,
        EPS: float(config.rms_norm_eps),
        ROPE_BASE: float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    if scaling := config.rope_scaling:
        keys[ROPE_TYPE] = scaling.kind
        if scaling.kind == "linear":
            keys[ROPE_FACTOR] = float(scaling.factor)
        else:
            keys[ROPE_TRAINED] = scaling.original_max_position_embeddings
    if architecture_of(config) == "minicpm":  # minicpm3's are constants in llama.cpp
        scales = (config.scale_emb, config.residual_scale, config.logit_divisor)
        keys |= zip(MUP_SCALES, map(float, scales), strict=True)
    elif folded := config.mup_folded:  # llama.cpp reads over it
        floats = {"scale_emb": float(folded.scale_emb), "scale_depth": float(folded.scale_depth)}
        keys |= {f"{FOLDED}.{name}": value for name, value in (asdict(folded) | floats).items()}
    return keys


def architecture_of(config: Config) -> str:
    """ "minicpm3", "llama" for a model without muP's constants, else "minicpm"."""
    if config.mla:
        return "minicpm3"
    return "llama" if config.scale_depth is None and config.dim_model_base is None else "minicpm"


def _check(config: Config) -> None:
    scaling = config.rope_scaling
    if config.num_experts:
        found = f"a mixture of {config.num_experts} experts a layer"
    elif config.hidden_act != "silu":
        found = f"the activation {config.hidden_act}"
    elif scaling and scaling.kind == "dynamic":
        found = "dynamic NTK rotation (rope_scaling)"
    elif scaling and scaling.kind == "longrope" and config.rotation_threshold == 0:
        found = "longrope that takes the long factors for short texts as well"
    elif config.mla and (config.scale_emb, config.scale_depth) != (12, 1.4):
        found = f"scale_emb {config.scale_emb:g} and scale_depth {config.scale_depth} (not 12, 1.4)"
    elif config.mla and config.attention_bias:
        found = "latent attention with a bias"
    else:
        return
    raise InvalidArgumentError(
        f"this model has {found}, which llama.cpp does not run rightly; GGUF is for the others"
    )
