"""Converts MiniCPM checkpoints to Llama's names and constants, and back.

A Llama has no muP multipliers, so they go into its weights, in one of two ways:
- `fold`, as OpenBMB publishes its llama format: embedding x scale_emb, o_proj and down_proj x
  residual_scale, a head of its own / logit_divisor. A tied embedding becomes two matrices.
- `fold_tied`, as small as the source: the residual stream is carried in units of scale_emb (see
  fused.py), so the embedding stays as it is and stays tied.
A packed matrix keeps its codes; its scales and biases are multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from ..arguments import number, shown, whole
from ..errors import InvalidArgumentError, WeightsError
from ..model.config import Config
from ..model.config_sections import FOLDED, MAX_SIZE, FoldedMuP
from .checkpoint import Checkpoint
from .config_file import GRANITE_KEYS, stated
from .lazy_ops import scaled
from .lazy_tensor import LazyTensor

EMBEDDING, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"
BRANCHES = ("self_attn.o_proj", "mlp.down_proj")
"""The last projection of each residual branch."""

EPS = {mx.float32: 2**-23, mx.float16: 2**-10, mx.bfloat16: 2**-7}
"""By float format, the step after 1."""

MUP_KEYS = ("scale_emb", "scale_depth", "dim_model_base")
ELSEWHERE = ("auto_map", "rope_parameters", "dtype", *MUP_KEYS, *GRANITE_KEYS)
"""Keys of config.json with another meaning, or none, in another architecture."""


@dataclass(frozen=True, kw_only=True)
class Scales:
    """muP's constants, as config.json names them."""

    scale_emb: float
    """The embedding is multiplied by it."""
    scale_depth: float
    """Branches are multiplied by it over the root of the number of layers."""
    dim_model_base: int
    """The last hidden state is divided by hidden_size over it."""

    def __post_init__(self) -> None:
        whole("dim_model_base", self.dim_model_base)
        for name, value in asdict(self).items():
            if not 0 < number(name, value) < MAX_SIZE:
                raise InvalidArgumentError(
                    f"{name} must be above 0 and below 2**31, got {shown(value)}"
                )


def fold(checkpoint: Checkpoint) -> Checkpoint:
    """The llama format: a LlamaForCausalLM with a head of its own, exact but for rounding.

    Raises InvalidArgumentError for what transformers' Llama cannot express, WeightsError for
    packed matrices whose scales cannot be multiplied.
    """
    config = checkpoint.config
    check_plain(config, "llama")
    check_rotation(config, "llama")
    tensors = dict(checkpoint.tensors)
    raw = _llama_config(checkpoint.raw, config, "llama")
    if config.tie_word_embeddings and config.scale_emb * config.logit_divisor != 1.0:
        tensors |= {
            name.replace(EMBEDDING, HEAD): tensor
            for name, tensor in tensors.items()
            if name.startswith(EMBEDDING)
        }
        raw["tie_word_embeddings"] = False
        packing = raw.get("quantization")
        if isinstance(packing, dict) and EMBEDDING in packing:
            raw["quantization"] = packing | {HEAD: packing[EMBEDDING]}
    factors = {EMBEDDING: config.scale_emb, HEAD: 1 / config.logit_divisor}
    factors |= dict.fromkeys(_branches(config), config.residual_scale)
    return Checkpoint(raw=raw, tensors=multiplied(checkpoint, tensors, factors))


def fold_tied(checkpoint: Checkpoint) -> Checkpoint:
    """The mlx format: a LlamaForCausalLM that shares its embedding as the source does, or a
    MiniCPM3 as mlx-lm's own reads it.

    Raises as `fold`, of what mlx-lm cannot express.
    """
    config = checkpoint.config
    check_rotation(config, "mlx")
    if config.mla:
        if config.value_dim * config.num_attention_heads != config.hidden_size:
            raise InvalidArgumentError(
                f"format mlx: this model's values are {config.value_dim} wide, and those of "
                "mlx-lm's MiniCPM3 hidden_size / num_attention_heads; choose format mup"
            )
        return fold_logits(checkpoint)
    check_plain(config, "mlx")
    raw = _llama_config(checkpoint.raw, config, "mlx")
    raw["rms_norm_eps"] = config.rms_norm_eps / config.scale_emb**2
    factors = {NORM: 1 / config.logit_divisor}
    factors |= dict.fromkeys(_branches(config), config.residual_scale / config.scale_emb)
    return Checkpoint(raw=raw, tensors=multiplied(checkpoint, checkpoint.tensors, factors))


def fold_logits(checkpoint: Checkpoint) -> Checkpoint:
    """A MiniCPM3 whose last norm contains the logit divisor, which mlx-lm leaves out where the head
    is the embedding; other models as they are."""
    config = checkpoint.config
    if not config.mla or not config.tie_word_embeddings or config.logit_divisor == 1.0:
        return checkpoint
    raw = {**checkpoint.raw, "dim_model_base": config.hidden_size}
    factors = {NORM: 1 / config.logit_divisor}
    return Checkpoint(raw=raw, tensors=multiplied(checkpoint, checkpoint.tensors, factors))


def unfold(checkpoint: Checkpoint, scales: Scales, tie: bool | None = None) -> Checkpoint:
    """A MiniCPM of those constants that computes what this Llama does; the inverse of `fold`, and
    of `fold_tied` where the config records it.

    Where the Llama has a head of its own, `tie` says whether it is the embedding over again; by
    default both are read and compared. Raises WeightsError as `fold`.
    """
    config = checkpoint.config
    raw = _minicpm_config(checkpoint.raw, config, scales)
    target = Config.from_dict(raw)
    if config.mup_folded == FoldedMuP(format="mlx", **asdict(scales)):
        factors = dict.fromkeys(_branches(config), target.scale_emb / target.residual_scale)
        factors[NORM] = target.logit_divisor
        raw["rms_norm_eps"] = float(f"{config.rms_norm_eps * target.scale_emb**2:.12g}")
        return Checkpoint(raw=raw, tensors=multiplied(checkpoint, checkpoint.tensors, factors))
    factors = dict.fromkeys(_branches(config), 1 / target.residual_scale)
    factors[EMBEDDING] = 1 / target.scale_emb
    if config.tie_word_embeddings:  # the head then has the embedding's factor as well
        factors[NORM] = target.scale_emb * target.logit_divisor
    else:
        factors[HEAD] = target.logit_divisor
    tensors = multiplied(checkpoint, checkpoint.tensors, factors)
    if not config.tie_word_embeddings and (_same_head(tensors) if tie is None else tie):
        tensors = {name: t for name, t in tensors.items() if not name.startswith(f"{HEAD}.")}
        raw["tie_word_embeddings"] = True
        if isinstance(raw.get("quantization"), dict):
            raw["quantization"] = {k: v for k, v in raw["quantization"].items() if k != HEAD}
    return Checkpoint(raw=raw, tensors=tensors)


def check_plain(config: Config, target: str) -> None:
    """Refuse what no Llama has."""
    if config.num_experts:
        found = f"a mixture of {config.num_experts} experts a layer"
    elif config.hidden_act != "silu":
        found = f"the activation {config.hidden_act}"
    elif config.mla:
        found = "latent attention"
    else:
        return
    raise InvalidArgumentError(
        f"format {target}: this model has {found}, which a Llama cannot express; choose format mup"
    )


def check_rotation(config: Config, target: str) -> None:
    """Refuse a longrope that would be rotated otherwise; the other kinds all agree.

    Where the context is longer than the trained one, MiniCPM takes the long factors for texts of
    every length, and so does mlx-lm, always; transformers takes the short ones for short texts.
    """
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "longrope":
        return
    if scaling.short_factor == scaling.long_factor:
        return
    always_long = config.max_position_embeddings > scaling.original_max_position_embeddings
    if target == "llama" and always_long:
        raise InvalidArgumentError(
            "format llama: this model's longrope uses the long factors for short texts as well, "
            "and transformers' Llama would not; choose format mlx or mup"
        )
    if target == "mlx" and not always_long:
        raise InvalidArgumentError(
            "format mlx: this model's longrope uses the short factors for short texts, and "
            "mlx-lm's Llama would not; choose format llama or mup"
        )


def multiplied(
    checkpoint: Checkpoint, tensors: Mapping[str, LazyTensor], factors: Mapping[str, float]
) -> dict[str, LazyTensor]:
    """`tensors`, each module's output multiplied by its factor, where it has one.

    `checkpoint` says how they are packed.
    """
    packings = checkpoint.packings
    if EMBEDDING in packings:
        packings.setdefault(HEAD, packings[EMBEDDING])
    result = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        factor = factors.get(module, 1.0)
        packed = f"{module}.scales" in tensors
        if packed and factor != 1.0 and packings[module].mode != "affine":
            raise WeightsError(
                f"{module} is packed as {packings[module].mode}, whose coarse scales cannot be "
                "multiplied; add --dequantize"
            )
        codes = packed and part == "weight"
        result[name] = tensor if codes else scaled(name, tensor, factor, tensor.dtype)
    return result


def _branches(config: Config) -> list[str]:
    layers = range(config.num_hidden_layers)
    return [f"model.layers.{i}.{branch}" for i in layers for branch in BRANCHES]


def _llama_config(raw: Mapping[str, Any], config: Config, format: str) -> dict[str, Any]:
    """config.json of the same shape as a Llama, with nothing left to the reader's defaults.

    It records the constants that are folded into the weights, which adapters are rescaled by; those
    of a Llama stay as they were.
    """
    kept = {key: value for key, value in raw.items() if key not in ELSEWHERE}
    if config.scale_depth is not None and config.dim_model_base is not None:
        constants = {key: getattr(config, key) for key in MUP_KEYS}
        kept[FOLDED] = {"format": format, **constants}
    return kept | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "mlp_bias": False,
        **stated(config),
    }


def _minicpm_config(raw: Mapping[str, Any], config: Config, scales: Scales) -> dict[str, Any]:
    kept = {key: value for key, value in raw.items() if key not in (*ELSEWHERE, FOLDED)}
    return kept | {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        **stated(config),
        **asdict(scales),
    }


def _same_head(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether the head is the embedding, but for what rounding each of them to its format did."""
    parts = [name.removeprefix(EMBEDDING) for name in tensors if name.startswith(EMBEDDING)]
    heads = [name.removeprefix(HEAD) for name in tensors if name.startswith(f"{HEAD}.")]
    return sorted(parts) == sorted(heads) and all(
        _same(tensors[EMBEDDING + part], tensors[HEAD + part]) for part in parts
    )


def _same(one: LazyTensor, other: LazyTensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    left, right = one.load(), other.load()
    if not mx.issubdtype(one.dtype, mx.floating):
        return bool(mx.array_equal(left, right).item())
    limit = 4 * EPS[one.dtype]  # two roundings each, there and back
    # Below float16's normal numbers, steps are as wide as in them.
    floor = mx.abs(left).max().astype(mx.float32) * (limit * 2**-10)
    rows = max(1, (1 << 24) // max(1, one.shape[-1]))  # in blocks: the comparison is in float32
    for start in range(0, one.shape[0], rows):
        a, b = (array[start : start + rows].astype(mx.float32) for array in (left, right))
        if not (mx.abs(a - b) <= limit * mx.abs(a) + floor).all().item():
            return False
    return True
