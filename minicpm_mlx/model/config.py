"""A model's shape and constants, read from config.json.

Absent keys take the defaults of the reference implementation (OpenBMB's configuration_minicpm.py,
transformers' LlamaConfig): the published 2B config states neither `model_type`, `rope_theta` nor
`tie_word_embeddings`, and a port that guesses differs from the first token on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..arguments import json_number, shown
from ..errors import ConfigError
from ..files.lfs import FOUND, is_pointer
from .config_sections import (
    MAX_SIZE,
    FoldedMuP,
    MLAWidths,
    Quantization,
    RopeScaling,
    check_types,
    config_error,
    dense_len,
    folded_mup,
    kind_of,
    mla_widths,
    packing,
    rotation,
)

ACTIVATIONS = ("silu", "fatrelu")
FAMILIES = {
    "MiniCPMForCausalLM": "minicpm",
    "MiniCPM3ForCausalLM": "minicpm3",
    "LlamaForCausalLM": "llama",
}
REQUIRED = (
    *("hidden_size", "num_hidden_layers", "intermediate_size"),
    *("num_attention_heads", "vocab_size"),
)
MAX_BLOCKS = 10_000
"""Most layers, or experts in all of them: building more takes minutes before a tensor is missed."""
MAY_BE_ZERO = ("hidden_act_param", "num_experts", "num_experts_per_tok", "bos_token_id")
"""All other numbers of a config are above 0."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape and constants of one model; a plain Llama is the case in which all scales are 1."""

    hidden_size: int
    """Width of the residual stream."""
    num_hidden_layers: int
    """Number of blocks."""
    intermediate_size: int
    """Width of the feed-forward layer (of one expert, in a mixture)."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key and value heads; fewer than query heads means grouped-query attention."""
    head_dim: int
    """Width of one head's queries and keys."""
    vocab_size: int
    """Rows of the embedding."""
    max_position_embeddings: int = 2048
    """Context in tokens."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in each norm."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """None: plain rotation."""
    tie_word_embeddings: bool = True
    """Whether the head is the embedding, transposed."""
    attention_bias: bool = False
    """Whether q, k, v and o have a bias."""
    hidden_act: str = "silu"
    """"silu", or "fatrelu" (S-1B): values at or below a threshold become 0."""
    hidden_act_param: float = 0.0
    """fatrelu's threshold."""
    num_experts: int = 0
    """Experts a layer; 0: one ordinary feed-forward layer."""
    num_experts_per_tok: int = 2
    """Experts that see a token."""
    scale_emb: float = 1.0
    """muP: the embedding is multiplied by it."""
    scale_depth: float | None = None
    """muP: see residual_scale; None: branches are not scaled."""
    dim_model_base: int | None = None
    """muP: see logit_divisor; None: logits are not scaled."""
    bos_token_id: int | None = 1
    """Begins every text."""
    eos_token_ids: tuple[int, ...] = (2,)
    """Each ends a reply."""
    quantization: Quantization | None = None
    """How packed matrices are packed where layer_quantization does not say."""
    layer_quantization: tuple[tuple[str, Quantization], ...] = ()
    """Layers packed otherwise: (module path, how)."""
    # Not in the repr, which fingerprints are made of: these change nothing that the model computes.
    unpacked: tuple[str, ...] = field(default=(), repr=False)
    """Matrices that are not packed though others are: (module path), where that is known."""
    mup_folded: FoldedMuP | None = field(default=None, repr=False)
    """muP's constants that a Llama's weights contain, where its conversion recorded them."""
    mla: MLAWidths | None = field(default=None, repr=False)
    """None: keys and values of each head are projected from the residual stream."""
    dense_len: int | None = field(default=None, repr=False)
    """Longest text that the published mode attends to densely; beyond it is sparse there, and dense
    here. None: the published mode is dense."""

    @property
    def rope_dim(self) -> int:
        """Width of the part of a head that is rotated."""
        return self.mla.qk_rope_head_dim if self.mla else self.head_dim

    @property
    def value_dim(self) -> int:
        """Width of one head's values."""
        return self.mla.v_head_dim if self.mla else self.head_dim

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Heads, and widths of what is cached as keys and as values, of one layer."""
        if self.mla:
            return 1, self.mla.qk_rope_head_dim, self.mla.kv_lora_rank
        return self.num_key_value_heads, self.head_dim, self.head_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices, by path in the layer; one expert's once."""
        H, F, heads = self.hidden_size, self.intermediate_size, self.num_attention_heads
        queries, values = heads * self.head_dim, heads * self.value_dim
        if mla := self.mla:
            keys = heads * mla.qk_nope_head_dim
            attention = {
                "q_a_proj": (H, mla.q_lora_rank),
                "q_b_proj": (mla.q_lora_rank, queries),
                "kv_a_proj_with_mqa": (H, mla.kv_lora_rank + self.rope_dim),
                "kv_b_proj": (mla.kv_lora_rank, keys + values),
            }
        else:
            keys = self.num_key_value_heads * self.head_dim
            attention = {"q_proj": (H, queries), "k_proj": (H, keys), "v_proj": (H, keys)}
        attention["o_proj"] = (values, H)
        if self.num_experts:
            mlp = {"w1": (H, F), "w3": (H, F), "w2": (F, H)}
        else:
            mlp = {"gate_proj": (H, F), "up_proj": (H, F), "down_proj": (F, H)}
        paths = {f"self_attn.{name}": shape for name, shape in attention.items()}
        return paths | {f"mlp.{name}": shape for name, shape in mlp.items()}

    @property
    def biased(self) -> tuple[str, ...]:
        """Paths in the layer of the matrices that have a bias, if `attention_bias` is set."""
        names = ("q_a_proj", "kv_a_proj_with_mqa") if self.mla else ("q_proj", "k_proj", "v_proj")
        return tuple(f"self_attn.{name}" for name in (*names, "o_proj"))

    @property
    def residual_scale(self) -> float:
        """Multiplier of each residual branch."""
        if self.scale_depth is None:
            return 1.0
        return self.scale_depth / math.sqrt(self.num_hidden_layers)

    @property
    def logit_divisor(self) -> float:
        """The last hidden state is divided by it before the head."""
        return 1.0 if self.dim_model_base is None else self.hidden_size / self.dim_model_base

    @property
    def rotation_threshold(self) -> int | None:
        """Texts longer than this are rotated otherwise, the more so the longer; None: no such."""
        scaling = self.rope_scaling
        if scaling and scaling.kind == "dynamic":
            return self.max_position_embeddings
        if scaling and scaling.kind == "longrope":
            # The reference sizes its table for the whole context at the start, and so never
            # meets a "short" text where the context is longer than the trained one.
            trained = scaling.original_max_position_embeddings
            return trained if self.max_position_embeddings <= trained else 0
        return None

    @property
    def context_length(self) -> int:
        """Tokens the model can attend to; dynamic NTK stretches what it was trained on."""
        scaling = self.rope_scaling
        stretch = scaling.factor if scaling and scaling.kind == "dynamic" else 1.0
        return int(self.max_position_embeddings * stretch)

    def __post_init__(self) -> None:
        check_types(self)
        for name in (member.name for member in fields(self)):
            value = getattr(self, name)
            if type(value) in (int, float) and value <= 0 and name not in MAY_BE_ZERO:
                raise config_error(f"{name} must be above 0, got {value}")
        rotated = "qk_rope_head_dim" if self.mla else "head_dim"
        if self.rope_dim % 2:
            raise config_error(f"{rotated} must be even, got {self.rope_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise config_error(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple "
                f"of num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise config_error(
                f"unknown hidden_act {self.hidden_act!r}; "
                f"this library knows {', '.join(ACTIVATIONS)}"
            )
        if self.num_experts < 0:
            raise config_error(f"num_experts must be 0 or more, got {self.num_experts}")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise config_error(
                f"num_experts_per_tok must be between 1 and num_experts "
                f"({self.num_experts}), got {self.num_experts_per_tok}"
            )
        if self.num_hidden_layers * max(self.num_experts, 1) > MAX_BLOCKS:
            raise config_error(
                f"num_hidden_layers times num_experts must be at most {MAX_BLOCKS}, "
                f"got {self.num_hidden_layers} layers and {self.num_experts} experts"
            )
        for path, shape in self.projections.items():
            if max(shape) >= MAX_SIZE:
                raise config_error(
                    f"{path} would be {shape[0]} by {shape[1]}; head_dim, num_attention_heads and "
                    f"the other sizes must keep it below {MAX_SIZE}"
                )
        scaling = self.rope_scaling
        if scaling and scaling.kind == "dynamic" and self.rope_dim == 2:
            raise config_error(f"{rotated} must be above 2 for dynamic rope_scaling")
        if scaling and scaling.kind == "longrope":
            for name in ("short_factor", "long_factor"):
                if (found := len(getattr(scaling, name))) != self.rope_dim // 2:
                    raise config_error(
                        f"rope_scaling.{name} must hold {rotated} / 2 = "
                        f"{self.rope_dim // 2} numbers, got {found}"
                    )

    @classmethod
    def load(cls, folder: str | Path) -> Config:
        """Read `folder`/config.json."""
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: not found; a model folder needs a config.json") from None
        except (OSError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from None
        except ValueError as error:  # JSONDecodeError, or a number of more digits than Python takes
            if is_pointer(path):
                raise ConfigError(f"{path}: expected JSON, found {FOUND}") from None
            raise ConfigError(f"{path}: not valid JSON ({error})") from None
        try:
            return cls.from_dict(raw)
        except ConfigError as error:
            raise error.at(path) from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Config:
        """Build from a parsed config.json of either family; keys of no consequence are ignored."""
        if not isinstance(raw, Mapping):
            raise config_error(f"expected an object, got {kind_of(raw)}")
        present = {key: value for key, value in raw.items() if value is not None}
        family = _family(present)
        values = {f.name: present[f.name] for f in fields(cls) if f.name in present}
        values.update(mla=None, unpacked=(), dense_len=dense_len(present))
        _require(values, *REQUIRED)
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        if family == "minicpm3":
            # The reference's two forms disagree on the defaults of these.
            _require(values, "scale_emb", "scale_depth", "dim_model_base", "rms_norm_eps")
            mla = mla_widths(present, *_hidden_and_heads(values))
            values.update(mla=mla, head_dim=mla.head_dim)
        values.setdefault("head_dim", _head_dim(values))
        values.update(rotation(present))
        values.update(_special_tokens(present))
        values.update(packing(present))
        if family == "llama":
            values.setdefault("tie_word_embeddings", False)
            for key in ("scale_emb", "scale_depth", "dim_model_base"):
                values.pop(key, None)
            values["mup_folded"] = folded_mup(present)
        else:
            values.pop("mup_folded", None)
            values.setdefault("scale_depth", 1.0)
            values.setdefault("dim_model_base", 1)
        if present.get("mlp_bias"):
            raise config_error("mlp_bias is not supported")
        return cls(**values)


def _family(raw: Mapping[str, Any]) -> str:
    """A value of FAMILIES; `architectures` decides, `model_type` where it is absent."""
    stated = raw.get("architectures")
    names = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    _refuse_other_kinds(raw, names)
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    if not names and raw.get("model_type") in FAMILIES.values():
        return str(raw["model_type"])
    found = (
        f"architectures {stated}"
        if isinstance(stated, list) and stated
        else f"model_type {raw.get('model_type')!r} and no architectures"
    )
    raise config_error(f"expected one of {', '.join(FAMILIES)}, got {found}")


DRAFT_ADVICE = "which drafts for its own model; load that model, and a small one with --draft"
OTHER_KINDS = (
    ("eagle", f"an Eagle head, {DRAFT_ADVICE}"),
    ("dspark", f"a DSpark head, {DRAFT_ADVICE}"),
    ("sala", "MiniCPM-SALA, whose linear attention is not supported; take a MiniCPM5 or 4.1"),
    ("minicpmv", "a vision model; mlx-vlm runs these"),
    ("minicpmo", "a vision and speech model; mlx-vlm runs these"),
    (
        "sequenceclassification",
        "a reranker, which scores pairs of texts and writes none; sentence-transformers runs these",
    ),
)
"""Other models of the family, by a part of the name of their architecture, type or code."""

OTHER_KEYS = {
    "draft_vocab_size": "eagle",
    "eagle_config": "eagle",
    "dspark_config": "dspark",
    "mixer_types": "sala",
    "vision_config": "minicpmv",
    "audio_config": "minicpmo",
}
"""Keys that only such models have, and the part of a name they stand for."""


def _refuse_other_kinds(raw: Mapping[str, Any], names: list[str]) -> None:
    auto_map = raw.get("auto_map")
    codes = [*auto_map.values()] if isinstance(auto_map, Mapping) else []
    if any(str(code).endswith(tuple(FAMILIES)) for code in codes):
        codes = []  # a text model's names a class for every task
    stated = [*names, raw.get("model_type"), *codes]
    stated += [part for key, part in OTHER_KEYS.items() if key in raw]
    text = " ".join(name for name in stated if isinstance(name, str)).lower()
    for part, kind in OTHER_KINDS:
        if part in text:
            raise config_error(f"this is {kind}")
    if raw.get("is_causal") is False or names in (["MiniCPM"], ["MiniCPMModel"]):
        raise config_error(
            "this is an embedding model (is_causal is false), which writes no text; "
            "sentence-transformers runs these"
        )


def _require(values: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if name not in values:
            raise config_error(f"{name} is missing")


def _hidden_and_heads(values: Mapping[str, Any]) -> tuple[int, int]:
    names = ("hidden_size", "num_attention_heads")
    hidden, heads = (json_number(values[name]) for name in names)
    for name, value in zip(names, (hidden, heads), strict=True):
        if type(value) is not int or value <= 0:  # True is an int
            raise config_error(f"{name} must be a whole number above 0, got {shown(value)}")
    return hidden, heads


def _head_dim(values: Mapping[str, Any]) -> int:
    hidden, heads = _hidden_and_heads(values)
    if hidden % heads:
        raise config_error(
            f"hidden_size ({hidden}) must be a multiple of "
            f"num_attention_heads ({heads}) where head_dim is not given"
        )
    return int(hidden // heads)


def _special_tokens(raw: Mapping[str, Any]) -> dict[str, Any]:
    eos = raw.get("eos_token_id", 2)
    return {"eos_token_ids": tuple(eos) if isinstance(eos, list) else (eos,)}
