"""Nested sections of a config (rotation and quantization), and the check of field types."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..arguments import json_number, shown
from ..errors import ConfigError

ROPE_KINDS = ("linear", "dynamic", "longrope")
PACKINGS = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
"""By quantization mode, the bits and the group sizes that MLX packs."""
MAX_SIZE = 2**31
"""MLX stores a dimension in a signed 32-bit number."""


def config_error(problem: str) -> ConfigError:
    return ConfigError(problem, source="config.json")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies stretch beyond the trained context."""

    kind: str
    """"linear", "dynamic" (NTK) or "longrope"."""
    factor: float = 1.0
    """linear: positions are divided by it; dynamic: how far the base grows."""
    short_factor: tuple[float, ...] = ()
    """longrope: one divisor a frequency while the text is short (head_dim / 2 of them)."""
    long_factor: tuple[float, ...] = ()
    """longrope: the same once the text is long."""
    original_max_position_embeddings: int = 0
    """longrope: the length up to which the text counts as short."""

    def __post_init__(self) -> None:
        check_types(self, "rope_scaling.")
        if self.kind not in ROPE_KINDS:
            raise config_error(
                f"unknown rope_scaling type {self.kind!r}; "
                f"this library knows {', '.join(ROPE_KINDS)}"
            )
        if not 0 < self.factor < MAX_SIZE:
            raise config_error(
                f"rope_scaling.factor must be above 0 and below {MAX_SIZE}, got {self.factor}"
            )
        if self.kind == "longrope" and self.original_max_position_embeddings < 2:
            raise config_error(
                "longrope needs original_max_position_embeddings of 2 or more, "
                f"got {self.original_max_position_embeddings}"
            )
        if any(f <= 0 for f in self.short_factor + self.long_factor):
            raise config_error("longrope factors must all be above 0")


FOLDED = "mup_folded"
"""Key of config.json under which `convert` records what it multiplied into the weights."""


@dataclass(frozen=True, kw_only=True)
class FoldedMuP:
    """muP's constants that are in the weights of a Llama, named as in a MiniCPM's config."""

    format: str
    """"llama" or "mlx": the way they were folded in (see weights/llama_format.py)."""
    scale_emb: float
    scale_depth: float
    dim_model_base: int

    def __post_init__(self) -> None:
        check_types(self, f"{FOLDED}.")
        if self.format not in ("llama", "mlx"):
            raise config_error(f"{FOLDED}.format must be llama or mlx, got {self.format!r}")
        if not min(self.scale_emb, self.scale_depth, self.dim_model_base) > 0:
            raise config_error(f"the constants of {FOLDED} must be above 0")


def folded_mup(raw: Mapping[str, Any]) -> FoldedMuP | None:
    """Parse what a conversion recorded."""
    section = raw.get(FOLDED)
    if section is None:
        return None
    if not isinstance(section, Mapping):
        raise config_error(f"{FOLDED} must be an object, got {kind_of(section)}")
    try:
        return FoldedMuP(**section)
    except TypeError:
        expected = ", ".join(field.name for field in fields(FoldedMuP))
        raise config_error(f"{FOLDED} must state {expected}, got {shown(dict(section))}") from None


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How the matrices of an MLX checkpoint are packed."""

    group_size: int
    """Weights that share one scale."""
    bits: int
    """Bits a weight."""
    mode: str = "affine"
    """"affine" (scale and bias) or one of MLX's float formats."""

    @property
    def bits_per_weight(self) -> float:
        """With its share of a group's scale and bias, of 16 bits each, or of a scale of 8."""
        return self.bits + (32 if self.mode == "affine" else 8) / self.group_size

    def __post_init__(self) -> None:
        check_types(self, "quantization.")
        if self.mode not in PACKINGS:
            raise config_error(
                f"unknown quantization mode {self.mode!r}; this library knows {', '.join(PACKINGS)}"
            )
        bits, group_sizes = PACKINGS[self.mode]
        if self.bits not in bits or self.group_size not in group_sizes:
            raise config_error(
                f"quantization ({self.mode}) must have {_either(bits)} bits in groups "
                f"of {_either(group_sizes)}, got {self.bits} bits in groups of {self.group_size}"
            )


@dataclass(frozen=True, kw_only=True)
class MLAWidths:
    """Widths of multi-head latent attention (MiniCPM3)."""

    q_lora_rank: int
    """Width of the vector that queries are computed from."""
    kv_lora_rank: int
    """Width of the latent that keys and values are computed from."""
    qk_nope_head_dim: int
    """Width of the part of a query or key that is not rotated."""
    qk_rope_head_dim: int
    """Width of the part that is rotated; a key's is the same for all heads."""
    v_head_dim: int
    """Width of one head's values."""

    def __post_init__(self) -> None:
        check_types(self)
        for field in fields(self):
            if (value := getattr(self, field.name)) <= 0:
                raise config_error(f"{field.name} must be above 0, got {value}")

    @property
    def head_dim(self) -> int:
        """Width of one head's queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


def mla_widths(raw: Mapping[str, Any], hidden_size: int, heads: int) -> MLAWidths:
    """Parse the widths of latent attention; values are hidden_size / heads wide unless stated."""
    names = [field.name for field in fields(MLAWidths)]
    values = {name: raw[name] for name in names if name in raw}
    if "v_head_dim" not in values:
        if hidden_size % heads:
            raise config_error(
                f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({heads}) "
                "where v_head_dim is not given"
            )
        values["v_head_dim"] = hidden_size // heads
    for name in names:
        if name not in values:
            plain = "; queries of one q_proj are not supported" if name == "q_lora_rank" else ""
            raise config_error(f"{name} is missing{plain}")
    return MLAWidths(**values)


def rotation(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the rotation: `rope_scaling`, or since transformers 5 `rope_parameters`."""
    section = raw.get("rope_parameters", raw.get("rope_scaling"))
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise config_error(f"rope_scaling must be an object, got {kind_of(section)}")
    theta = {"rope_theta": section["rope_theta"]} if section.get("rope_theta") is not None else {}
    kind = section.get("rope_type", section.get("type", "default"))
    if kind == "default":
        return {**theta, "rope_scaling": None}
    names = ("factor", "short_factor", "long_factor", "original_max_position_embeddings")
    values = {name: section[name] for name in names if section.get(name) is not None}
    if kind in ("linear", "dynamic") and "factor" not in values:
        raise config_error(f"{kind} rope_scaling needs a factor")
    for name in ("short_factor", "long_factor"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    return {**theta, "rope_scaling": RopeScaling(kind=kind, **values)}


def dense_len(raw: Mapping[str, Any]) -> int | None:
    """The longest text that `sparse_config` leaves dense; None where it says nothing of the kind,
    which is no error: nothing here depends on it."""
    section = raw.get("sparse_config")
    length = json_number(section.get("dense_len")) if isinstance(section, Mapping) else None
    return length if type(length) is int and 0 < length < MAX_SIZE else None


def packing(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Parse MLX's `quantization`: defaults, and under a module's path its differences."""
    section = raw.get("quantization")
    if section is None:
        foreign = raw.get("quantization_config")
        return {} if foreign is None else {"quantization": _foreign_packing(foreign)}
    if not isinstance(section, Mapping):
        raise config_error(f"quantization must be an object, got {kind_of(section)}")
    default = {key: section[key] for key in ("group_size", "bits", "mode") if key in section}
    sizes = {key: default[key] for key in ("group_size", "bits") if key in default}
    layers = {path: entry for path, entry in section.items() if isinstance(entry, Mapping)}
    try:
        return {
            "quantization": Quantization(**default),
            # A layer that names no mode is affine whatever the default: so mlx-lm reads it.
            "layer_quantization": tuple(
                (path, Quantization(**{**sizes, **entry})) for path, entry in layers.items()
            ),
        }
    except TypeError:
        raise config_error(
            "quantization must state bits and group_size, and mode at most, got "
            f"{shown(dict(section))}"
        ) from None


def _foreign_packing(stated: object) -> Quantization:
    """Convert the statement of GPTQ's or AWQ's 4 bits to MLX's packing (see weights/gptq_awq.py).

    ConfigError for whatever has no such form, saying what was found.
    """
    if not isinstance(stated, Mapping):
        raise config_error(f"quantization_config must be an object, got {kind_of(stated)}")
    method = stated.get("quant_method")
    bits = stated.get("bits", stated.get("w_bit"))
    group_size = stated.get("group_size", stated.get("q_group_size"))
    usual = "gemm" if method == "awq" else "gptq"
    form = stated.get("checkpoint_format", stated.get("format", stated.get("version", usual)))
    wanted = ("gemm",) if method == "awq" else ("gptq", "gptq_v2")
    if method not in ("gptq", "awq"):
        found = f"quant_method {shown(method)}"
    elif bits != 4:
        found = f"{method} in {shown(bits)} bits"
    elif group_size not in (32, 64, 128):
        found = f"{method} in groups of {shown(group_size)}"
    elif str(form).lower() not in wanted or stated.get("is_marlin_format"):
        found = f"{method} in the format {'marlin' if form in wanted else shown(form)}"
    elif method == "awq" and not stated.get("zero_point", True):
        found = "awq without zero points"
    else:
        return Quantization(group_size=group_size, bits=4)
    raise config_error(
        f"quantization_config is {found}; expected MLX's own `quantization`, or gptq "
        "(format gptq or gptq_v2) or awq (gemm, with zero points) in 4 bits and groups of 32, 64 "
        "or 128; take the unquantized checkpoint and `minicpm-mlx quantize`"
    )


_PLAIN_TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
_IN_WORDS = {
    "int": "a whole number",
    "float": "a finite number",
    "bool": "true or false",
    "str": "text",
    "tuple[int, ...]": "a whole number or a list of them",
    "tuple[float, ...]": "a list of finite numbers",
}


def check_types(instance: Any, prefix: str = "") -> None:
    """Check every field against its annotation; JSON may hold anything.

    A whole number that is written as 20.0 becomes an int where one is expected.
    """
    for field in fields(instance):
        value = getattr(instance, field.name)
        declared = str(field.type)
        optional = declared.endswith(" | None")
        name = declared.removesuffix(" | None")
        if name == "int":
            value = json_number(value)
        elif name == "tuple[int, ...]" and isinstance(value, tuple):
            value = tuple(map(json_number, value))
        object.__setattr__(instance, field.name, value)  # the sections are frozen
        if value is None and optional:
            continue
        if name.startswith("tuple[") and name.endswith(", ...]"):
            item = name.removeprefix("tuple[").removesuffix(", ...]")
            good = isinstance(value, tuple) and (
                item not in _PLAIN_TYPES or all(_is(item, v) for v in value)
            )
        else:
            good = name not in _PLAIN_TYPES or _is(name, value)
        if not good:
            raise config_error(
                f"{prefix}{field.name} must be {_IN_WORDS.get(name, name)}, got {shown(value)}"
            )
        if isinstance(value, int) and name == "int" and value >= MAX_SIZE:
            raise config_error(f"{prefix}{field.name} must be below {MAX_SIZE}, got {shown(value)}")


def _is(name: str, value: object) -> bool:
    if isinstance(value, bool) and name != "bool":
        return False
    if name == "float" and isinstance(value, int | float):
        return abs(value) <= sys.float_info.max  # neither NaN nor infinite, nor an int beyond both
    return isinstance(value, _PLAIN_TYPES[name])


def _either(choices: tuple[int, ...]) -> str:
    return " or ".join(map(str, choices))


def kind_of(value: object) -> str:
    return type(value).__name__
