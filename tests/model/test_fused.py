"""The inference form computes what the model that reads like the paper computes."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from minicpm_mlx import load_model
from minicpm_mlx.engine import KVCache
from minicpm_mlx.model.config_sections import Quantization
from minicpm_mlx.model.feed_forward import MoE
from minicpm_mlx.model.fused import (
    ConcatenatedLinear,
    FusedMLP,
    FusedModel,
    FusedMoE,
    fuse,
)
from minicpm_mlx.model.packing import apply_packing, dequantize, quantize
from minicpm_mlx.model.transformer import Model
from support.data import CASES, GOLDEN
from support.random_models import IDS, MLA, MOE, random_model, set_arrays


def gap(a: nn.Module, b: nn.Module) -> float:
    """Largest difference of two models' logits; that it exceeds none says that neither is NaN."""
    return float(mx.abs(a(IDS) - b(IDS)).max().item())


def both(make: Callable[[], Model]) -> tuple[Model, FusedModel]:
    return make(), fuse(make())


def packed(model: Model, bits: int = 4, group_size: int = 32, mode: str = "affine") -> Model:
    quantize(model, Quantization(bits=bits, group_size=group_size, mode=mode))
    return model


# ---- golden cases


@pytest.mark.parametrize("case", CASES)
def test_a_quantized_golden_case_keeps_its_logits(case: str) -> None:
    reference, fused = both(lambda: packed(load_model(GOLDEN / case, dtype="float32")))
    assert gap(reference, fused) < 1e-3
    dequantize(fused, mx.float32)
    assert gap(reference, fused) < 1e-3


# ---- other shapes

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one-layer": {"num_hidden_layers": 1},
    "grouped": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2},
    "one-kv-head": {"num_key_value_heads": 1},
    "wide-heads": {"head_dim": 48},
    "narrow-heads": {"head_dim": 6, "num_key_value_heads": 2},
    "untied": {"tie_word_embeddings": False},
    "biased": {"attention_bias": True},
    "odd": {"hidden_size": 60, "intermediate_size": 70, "num_attention_heads": 3, "head_dim": 10},
    "fatrelu": {"hidden_act": "fatrelu", "hidden_act_param": 0.1},
    "llama": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "large-eps": {"rms_norm_eps": 0.3},
    "latent": MLA,
    "latent-biased": {**MLA, "attention_bias": True},
    "experts": MOE,
    "one-expert": {"num_experts": 1, "num_experts_per_tok": 1},
    "all-experts": {"num_experts": 3, "num_experts_per_tok": 3},
    "fatrelu-experts": {**MOE, "hidden_act": "fatrelu", "hidden_act_param": 0.1},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_model_of_any_shape_keeps_its_logits(shape: dict[str, Any]) -> None:
    reference, fused = both(lambda: random_model(**shape))
    assert mx.abs(reference(IDS)).max() > 0.1  # else nothing is compared
    assert gap(reference, fused) < 1e-3


def test_cached_steps_keep_their_logits() -> None:
    reference, fused = both(lambda: random_model(num_key_value_heads=2, **MOE))
    caches: list[Any] = [[KVCache() for _ in reference.layers] for _ in range(2)]
    for steps in (IDS[:, :5], IDS[:, 5:6], IDS[:, 6:]):
        assert mx.allclose(reference(steps, caches[0]), fused(steps, caches[1]), rtol=0, atol=1e-3)


def test_hidden_states_and_head_make_the_logits() -> None:
    for model in both(random_model):
        assert mx.array_equal(model.logits(model.hidden(IDS)), model(IDS))


def test_fusing_uses_the_model_up() -> None:
    model = random_model()
    embedding = model.model.embed_tokens
    fused = fuse(model)
    assert model.layers == []
    assert fused.embed_tokens is embedding  # shared with the head, not copied
    assert len(fused.layers) == 2


# ---- packed in every way


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize(
    "shape", [{}, {"attention_bias": True}, MOE, MLA], ids=["mlp", "bias", "moe", "mla"]
)
def test_every_format_keeps_its_logits(mode: str, shape: dict[str, Any]) -> None:
    bits, group = {"affine": (6, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}.get(mode, (4, 32))
    reference, fused = both(lambda: packed(random_model(**shape), bits, group, mode))
    assert gap(reference, fused) < 1e-3


def test_quantized_experts_meet_only_their_tokens() -> None:
    fused = fuse(packed(random_model(**MOE)))
    for layer in fused.layers:
        assert isinstance(layer.mlp, FusedMoE)
        for stacked in (layer.mlp.gate_up.layer, layer.mlp.down.layer):
            assert isinstance(stacked, nn.QuantizedLinear)  # so gather_qmm
            assert stacked.weight.ndim == 3
        assert type(layer.mlp.gate) is nn.Linear


PROJECTIONS = [f"self_attn.{name}_proj" for name in "qkvo"]
PROJECTIONS += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.mark.parametrize("other", PROJECTIONS)
@pytest.mark.parametrize("how", ["8-bit", "group-64", "dense", "mxfp4"])
def test_projections_packed_otherwise_stay_apart(other: str, how: str) -> None:
    ways = {
        "8-bit": Quantization(bits=8, group_size=32),
        "group-64": Quantization(bits=4, group_size=64),
        "mxfp4": Quantization(bits=4, group_size=32, mode="mxfp4"),
    }

    def mixed() -> Model:
        model = random_model(intermediate_size=128)
        paths = {f"model.layers.{i}.{p}" for i in range(2) for p in PROJECTIONS}
        rest = dict.fromkeys(
            paths - {f"model.layers.1.{other}"}, Quantization(bits=4, group_size=32)
        )
        apply_packing(model, rest | ({f"model.layers.1.{other}": ways[how]} if how in ways else {}))
        return model

    reference, fused = both(mixed)
    assert gap(reference, fused) < 1e-3
    attention, mlp = fused.layers[1].self_attn, fused.layers[1].mlp
    apart = [type(layer) is ConcatenatedLinear for layer in (attention.qkv_proj, mlp.gate_up_proj)]
    assert apart == [other in PROJECTIONS[:3], other in PROJECTIONS[4:6]]
    dequantize(fused, mx.float32)
    assert gap(reference, fused) < 1e-3


@pytest.mark.parametrize("weight", ["w1", "w2", "w3"])
@pytest.mark.parametrize("experts", ["one", "all"])
def test_experts_packed_otherwise_are_not_stacked(weight: str, experts: str) -> None:
    def mixed() -> Model:
        model = random_model(intermediate_size=128, **MOE)
        four, eight = Quantization(bits=4, group_size=32), Quantization(bits=8, group_size=32)
        how = {
            f"model.layers.{i}.mlp.experts.{e}.{w}": four
            for i in range(2)
            for e in range(4)
            for w in ("w1", "w2", "w3")
        }
        for expert in range(4) if experts == "all" else [2]:
            how[f"model.layers.1.mlp.experts.{expert}.{weight}"] = eight
        apply_packing(model, how)
        return model

    reference, fused = both(mixed)
    assert gap(reference, fused) < 1e-3
    assert type(fused.layers[0].mlp) is FusedMoE
    # w2 alone is no concern of w1 and w3, as long as all experts have it the same.
    alike = weight == "w2" and experts == "all"
    assert type(fused.layers[1].mlp) is (FusedMoE if alike else MoE)


# ---- 16 bits


def loud(**changes: Any) -> Model:
    """A model whose feed-forward output is beyond float16 before the residual multiplier."""
    model = random_model(scale_depth=0.05, **changes)

    def louder(name: str, array: mx.array) -> mx.array:
        if name.endswith(("down_proj.weight", "w2.weight")):
            return mx.abs(array) * 400
        return mx.abs(array) if name.endswith(("proj.weight", "w1.weight", "w3.weight")) else array

    set_arrays(model, louder)
    return model


def coarse(model: Model) -> Model:
    """Layers in mxfp4; an embedding of that would give out bfloat16, whatever the model's dtype."""
    for layer in model.layers:
        quantize(layer, Quantization(bits=4, group_size=32, mode="mxfp4"))
    return model


FORMATS: dict[str, Callable[[Model], Model]] = {
    "dense": lambda model: model,
    "4-bit": packed,
    "mxfp4": coarse,
}


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [{}, MOE], ids=["mlp", "moe"])
def test_16_bits_do_not_overflow(
    form: Callable[[Model], Model], dtype: mx.Dtype, shape: dict[str, Any]
) -> None:
    def make() -> Model:
        model = loud(**shape)
        model.set_dtype(dtype)
        return form(model)

    wide = form(loud(**shape))
    raw = feed_forward_peak(wide) / wide.config.residual_scale
    assert 65504 < raw < 65504 / wide.config.residual_scale
    expected = wide(IDS)
    spread = mx.abs(expected).max().item()
    for model in both(make):
        found = model(IDS)
        assert found.dtype == dtype
        assert mx.isfinite(found).all()
        if not shape:  # tokens may be routed otherwise
            assert mx.abs(found - expected).max().item() < 0.1 * spread


def feed_forward_peak(model: Model) -> float:
    """The largest output of a feed-forward layer of the reference."""
    peaks: list[float] = []
    kind = type(model.layers[0].mlp)
    compute = kind.__call__

    def listen(mlp: nn.Module, x: mx.array) -> mx.array:
        out = compute(mlp, x)
        peaks.append(mx.abs(out).max().item())
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "__call__", listen)
        model(IDS)
    return max(peaks)


def test_multipliers_are_folded_in_float32() -> None:
    model = random_model(scale_depth=1.3, scale_emb=11)
    model.set_dtype(mx.bfloat16)
    weight = model.layers[0].mlp.down_proj.weight.astype(mx.float32)
    scale = model.config.residual_scale / 11
    layer = fuse(model).layers[0]
    assert isinstance(layer.mlp, FusedMLP)
    assert mx.array_equal(layer.mlp.down_proj.weight, (weight * scale).astype(mx.bfloat16))
