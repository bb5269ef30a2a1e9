"""The architecture in NumPy and float64, written from the papers and configs, slow and plain.

It computed the logits that golden cases are compared with on users' machines:
`python tests/support/numpy_model.py` writes them again. tests/verify compares it with what the
published PyTorch code gave.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Raw = dict[str, Any]
Weights = dict[str, Any]


def logits(raw: Raw, weights: Weights, ids: list[int]) -> np.ndarray:
    """Logits (T, V) of one text read at once; `weights` by the checkpoint's names."""
    llama = raw["architectures"] == ["LlamaForCausalLM"]
    w = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    layers, hidden = raw["num_hidden_layers"], raw["hidden_size"]
    branch = 1.0 if llama else raw["scale_depth"] / math.sqrt(layers)
    x = w["model.embed_tokens.weight"][ids] * (1.0 if llama else raw["scale_emb"])
    for layer in range(layers):
        p = f"model.layers.{layer}."
        attend = latent_attention if "kv_lora_rank" in raw else attention
        h = norm(x, w[p + "input_layernorm.weight"], raw["rms_norm_eps"])
        x = x + branch * attend(raw, w, p + "self_attn.", h)
        h = norm(x, w[p + "post_attention_layernorm.weight"], raw["rms_norm_eps"])
        x = x + branch * feed_forward(raw, w, p + "mlp.", h)
    x = norm(x, w["model.norm.weight"], raw["rms_norm_eps"])
    if not llama:
        x = x / (hidden / raw["dim_model_base"])
    tied = raw.get("tie_word_embeddings", not llama)
    return x @ w["model.embed_tokens.weight" if tied else "lm_head.weight"].T


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def split(x: np.ndarray, heads: int) -> np.ndarray:
    return x.reshape(len(x), heads, -1).transpose(1, 0, 2)  # (heads, T, D)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def causal(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Heads (H, T, D), fewer of keys and values, to (T, H * V)."""
    k, v = (np.repeat(x, len(q) // len(x), axis=0) for x in (k, v))
    scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
    T = q.shape[1]
    scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    return (softmax(scores) @ v).transpose(1, 0, 2).reshape(T, -1)


def attention(raw: Raw, w: Weights, p: str, x: np.ndarray) -> np.ndarray:
    H = raw["num_attention_heads"]
    K = raw.get("num_key_value_heads", H)
    q, k, v = (
        split(x @ w[f"{p}{name}_proj.weight"].T, heads)
        for name, heads in (("q", H), ("k", K), ("v", K))
    )
    return causal(rotate(raw, q), rotate(raw, k), v) @ w[p + "o_proj.weight"].T


def latent_attention(raw: Raw, w: Weights, p: str, x: np.ndarray) -> np.ndarray:
    H, nope, rank = (
        raw[name] for name in ("num_attention_heads", "qk_nope_head_dim", "kv_lora_rank")
    )
    q = norm(x @ w[p + "q_a_proj.weight"].T, w[p + "q_a_layernorm.weight"], 1e-6)
    q = split(q @ w[p + "q_b_proj.weight"].T, H)
    down = x @ w[p + "kv_a_proj_with_mqa.weight"].T
    latent = norm(down[:, :rank], w[p + "kv_a_layernorm.weight"], 1e-6)
    kv = split(latent @ w[p + "kv_b_proj.weight"].T, H)
    k_rope = np.repeat(rotate(raw, down[None, :, rank:]), H, axis=0)
    q = np.concatenate([q[..., :nope], rotate(raw, q[..., nope:])], -1)
    k = np.concatenate([kv[..., :nope], k_rope], -1)
    return causal(q, k, kv[..., nope:]) @ w[p + "o_proj.weight"].T


def rotate(raw: Raw, x: np.ndarray) -> np.ndarray:
    """Rotate (heads, T, D) from position 0 on; halves of D are paired."""
    _, T, D = x.shape
    base, step, amplitude, factors = float(raw.get("rope_theta", 1e4)), 1.0, 1.0, 1.0
    scaling = raw.get("rope_scaling") or {}
    kind, trained = scaling.get("type", scaling.get("rope_type")), raw["max_position_embeddings"]
    if kind == "linear":
        step = 1 / scaling["factor"]
    if kind == "dynamic" and trained < T:
        stretch = scaling["factor"] * T / trained - (scaling["factor"] - 1)
        base *= stretch ** (D / (D - 2))
    if kind == "longrope":
        original = scaling["original_max_position_embeddings"]
        # The published code sizes its table by the whole context at the start.
        long = max(trained, T) > original
        factors = np.array(scaling["long_factor" if long else "short_factor"])
        amplitude = math.sqrt(1 + math.log(max(trained / original, 1)) / math.log(original))
    frequencies = 1 / (factors * base ** (np.arange(0, D, 2) / D))
    angles = np.arange(T)[:, None] * step * frequencies
    cos, sin = np.cos(angles) * amplitude, np.sin(angles) * amplitude
    left, right = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def feed_forward(raw: Raw, w: Weights, p: str, x: np.ndarray) -> np.ndarray:
    if not raw.get("num_experts"):
        return gated(raw, w, [f"{p}{name}_proj.weight" for name in ("gate", "up", "down")], x)
    shares = softmax(x @ w[p + "gate.weight"].T)  # (T, E)
    kth = np.sort(shares, -1)[:, [-raw["num_experts_per_tok"]]]
    shares = np.where(shares >= kth, shares, 0)
    shares = shares / shares.sum(-1, keepdims=True)
    names = [
        [f"{p}experts.{e}.{n}.weight" for n in ("w1", "w3", "w2")] for e in range(len(shares.T))
    ]
    return sum(shares[:, [e]] * gated(raw, w, names[e], x) for e in range(len(names)))


def gated(raw: Raw, w: Weights, names: list[str], x: np.ndarray) -> np.ndarray:
    gate, up = (x @ w[name].T for name in names[:2])
    if raw.get("hidden_act") == "fatrelu":
        active = np.where(gate > raw["hidden_act_param"], gate, 0)
    else:
        active = gate / (1 + np.exp(-gate))
    return (active * up) @ w[names[2]].T


if __name__ == "__main__":
    from pathlib import Path

    from minicpm_mlx.verify import cases

    stored = {}
    for case in cases.CASES:
        weights = {name: parts["weight"] for name, parts in case.arrays().items()}
        found = logits(case.raw, weights, case.ids)[list(cases.POSITIONS)]
        stored[case.name] = found.astype(np.float32)
        print(f"{case.name}: deviation {found.std():.2f}")
    np.savez_compressed(Path(cases.__file__).with_name(cases.LOGITS), **stored)
