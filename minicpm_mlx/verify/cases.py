"""Golden cases: small models of each architecture, made from seeds, and the logits they must give.

Their weights lie on a grid of 4 bits whose numbers float16 and bfloat16 hold exactly. So the same
logits, which a float64 program computed, are right in every number format and in 4 bits; only
rounding on the way differs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from zlib import crc32

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..model.config import Config
from ..model.packing import packable
from ..model.transformer import Model
from ..weights.load import parameters

Array = npt.NDArray[Any]

GROUP = 64
"""Weights that share a scale."""
PROMPT = 48
"""Tokens of a case's text that are read at once; the others follow one by one."""
LENGTH = 56
"""Tokens of a case's text."""
POSITIONS = (0, 1, 7, 30, 47, 48, 51, 55)
"""Positions of the text whose logits are stored."""
LOGITS = "logits.npz"

MUP = {
    **{"architectures": ["MiniCPMForCausalLM"], "max_position_embeddings": 4096},
    **{"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 128, "rms_norm_eps": 1e-5},
}


@dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """A small model of one architecture, and a text."""

    name: str
    raw: dict[str, Any]
    """config.json, without quantization."""
    theta: float
    """Base of the rotation, whatever a reader of config.json takes it for."""
    seed: int = 0
    """Of the text; of a mixture one in which no router is near a tie at a stored position."""

    @property
    def config(self) -> Config:
        return Config.from_dict(self.raw)

    @property
    def ids(self) -> list[int]:
        """The text, LENGTH tokens."""
        return _integers(f"{self.name} text {self.seed}", LENGTH, self.raw["vocab_size"]).tolist()

    @property
    def logits(self) -> Array:
        """The logits that the model must give at POSITIONS, float32 (8, V)."""
        return _stored()[self.name]

    def arrays(self) -> dict[str, dict[str, Array]]:
        """Each parameter by name: `weight`, and of a matrix in 4 bits `codes`, `scales`, `biases`.

        All float64 but the codes, from 0 to 15; a scale and a bias are those of GROUP weights.
        """
        model, arrays = Model(self.config), {}
        modules = dict(model.named_modules())
        for name, array in parameters(model).items():
            path = name.removesuffix(".weight")
            packed = packable(modules[path], GROUP) and not path.endswith("mlp.gate")
            if array.ndim == 1:
                arrays[name] = {"weight": 0.625 + _integers(name, array.size, 7) / 8}
            else:
                arrays[name] = _matrix(name, (array.shape[0], array.shape[1]), packed)
        return arrays

    def write(self, folder: Path, *, packed: bool) -> None:
        """Write the checkpoint to `folder`, in float32, or with `packed` in 4 bits."""
        raw, tensors = dict(self.raw), dict[str, mx.array]()
        for name, parts in self.arrays().items():
            if packed and "codes" in parts:
                path = name.removesuffix(".weight")
                tensors[name] = mx.array(_words(parts["codes"]))
                tensors[f"{path}.scales"] = mx.array(parts["scales"].astype(np.float16))
                tensors[f"{path}.biases"] = mx.array(parts["biases"].astype(np.float16))
            else:
                dtype = np.float16 if packed else np.float32
                tensors[name] = mx.array(parts["weight"].astype(dtype))
        if packed:
            raw["quantization"] = {"bits": 4, "group_size": GROUP}
        (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)


def _matrix(name: str, shape: tuple[int, int], packed: bool) -> dict[str, Array]:
    """Scales are small whole numbers times a power of 2: a weight then needs 6 bits and a sign."""
    rows, columns = shape
    # Embedding and head make logits with a deviation near 2; other matrices keep the scale of
    # what passes through, so that attention is neither flat nor sharp.
    gain = 4.0 if "embed" in name or "lm_head" in name else 1.5
    unit = 2.0 ** np.round(np.log2(gain / (4.6 * 2.2 * np.sqrt(columns))))
    codes = _integers(name, rows * columns, 16).reshape(shape)
    groups = max(columns // GROUP, 1)
    scales = unit * (1 + _integers(f"{name} scales", rows * groups, 3)).reshape(rows, groups)
    biases = -8 * scales
    width = columns // groups
    weight = codes * np.repeat(scales, width, axis=1) + np.repeat(biases, width, axis=1)
    return {"weight": weight} | (
        {"codes": codes, "scales": scales, "biases": biases} if packed else {}
    )


def _integers(name: str, count: int, below: int) -> Array:
    """Numbers from 0, the same on every machine: splitmix64 of a counter from the name on."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(crc32(name.encode()) << 24)
        z *= np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z % np.uint64(below)).astype(np.int64)


def _words(codes: Array) -> Array:
    """Codes (rows, columns) as MLX packs them: eight to 32 bits, the first lowest."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    eights = codes.astype(np.uint32).reshape(len(codes), -1, 8)
    return np.bitwise_or.reduce(eights << shifts, axis=-1).astype(np.uint32)


@cache
def _stored() -> dict[str, Array]:
    path = resources.files(__package__).joinpath(LOGITS)
    with path.open("rb") as file, np.load(file, allow_pickle=False) as logits:
        return dict(logits)


def _factors(count: int, last: float) -> list[float]:
    return [round(1 + (last - 1) * i / (count - 1), 4) for i in range(count)]


CASES = [
    GoldenCase(
        name="minicpm-2b",
        theta=1e4,
        raw={
            **MUP,  # no rope_theta, no tie_word_embeddings: as published
            **{"hidden_size": 576, "intermediate_size": 704, "num_attention_heads": 9},
            **{"num_hidden_layers": 3, "vocab_size": 1003},
        },
    ),
    GoldenCase(
        name="minicpm-2b-128k",
        theta=1e6,
        raw={
            **MUP,
            **{"hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4},
            **{"num_hidden_layers": 2, "vocab_size": 1000, "tie_word_embeddings": False},
            **{"rope_theta": 1e6, "max_position_embeddings": 32},
            "rope_scaling": {"type": "dynamic", "factor": 4.0},
        },
    ),
    GoldenCase(
        name="minicpm-moe",
        theta=1e4,
        raw={
            **MUP,
            **{"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4},
            **{"num_hidden_layers": 2, "vocab_size": 1003},
            **{"num_experts": 8, "num_experts_per_tok": 2},
        },
    ),
    GoldenCase(
        name="minicpm-s",
        theta=1e4,
        raw={
            **MUP,
            **{"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4},
            **{"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 1003},
            **{"hidden_act": "fatrelu", "hidden_act_param": 0.03125},
            "rope_scaling": {"type": "linear", "factor": 2.0},
        },
    ),
    GoldenCase(
        name="minicpm3",
        theta=1e4,
        raw={
            **MUP,
            "architectures": ["MiniCPM3ForCausalLM"],
            **{"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4},
            **{"num_hidden_layers": 2, "vocab_size": 1000},
            **{"q_lora_rank": 192, "kv_lora_rank": 128},
            **{"qk_nope_head_dim": 64, "qk_rope_head_dim": 32},
            "max_position_embeddings": 256,
            "rope_scaling": {
                "type": "longrope",
                **dict.fromkeys(("short_factor", "long_factor"), _factors(16, 7)),
                "original_max_position_embeddings": 256,
            },
        },
    ),
    GoldenCase(
        name="minicpm4",
        theta=1e4,
        raw={
            **MUP,
            **{"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8},
            **{"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 1000},
            "max_position_embeddings": 256,
            "rope_scaling": {
                "rope_type": "longrope",
                **{"short_factor": _factors(32, 6), "long_factor": _factors(32, 49)},
                "original_max_position_embeddings": 64,
            },
        },
    ),
    GoldenCase(
        name="minicpm5",
        theta=5e6,
        raw={
            "architectures": ["LlamaForCausalLM"],
            **{"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8},
            **{"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 128},
            **{"vocab_size": 1000, "tie_word_embeddings": False, "rope_theta": 5e6},
            **{"max_position_embeddings": 131072, "rms_norm_eps": 1e-6},
        },
    ),
]
"""Widths are multiples of 512 where a GPU's fast kernels are to run, and others where the general
ones are."""
