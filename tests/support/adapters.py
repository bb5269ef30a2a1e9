"""Adapters with random values, and how they are compared and saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from minicpm_mlx.model.adapters import Adapter, LoRADelta, find_projections
from minicpm_mlx.model.transformer import Model

TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head")


LORA = {"fine_tune_type": "lora", "lora_parameters": {"rank": 3, "scale": 2.0, "dropout": 0.0}}


def random_adapter(
    model: Model, *, dora: bool = False, seed: int = 5, targets: tuple[str, ...] = TARGETS
) -> Adapter:
    mx.random.seed(seed)
    deltas = {}
    for name, place in find_projections(model).items():
        if name.endswith(targets):
            out = place.outputs
            deltas[name] = LoRADelta(
                a=mx.random.normal((place.inputs, 3)),
                b=mx.random.normal((3, out)) * 0.02,
                magnitude=mx.random.uniform(0.5, 2, (out,)) if dora else None,
            )
    return Adapter(folder=Path("adapter"), deltas=deltas, digest=f"{seed}")


def close(a: mx.array, b: mx.array) -> bool:
    return bool(mx.allclose(a, b, rtol=1e-3, atol=1e-3).item())


CAN_DORA = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


def saved(folder: Path, adapter: Adapter, layout: str, **config: Any) -> Path:
    """The files of an adapter as its own trainer writes them."""
    folder.mkdir()
    dora = any(delta.magnitude is not None for delta in adapter.deltas.values())
    tensors = {}
    for module, delta in adapter.deltas.items():
        if layout == "mlx":
            tensors |= {f"{module}.lora_a": delta.a, f"{module}.lora_b": delta.b / 2}
            tensors |= {f"{module}.m": delta.magnitude} if delta.magnitude is not None else {}
            continue
        stem = f"base_model.model.{module}"
        rank = len(delta.b)
        scale = 6 / (rank**0.5 if config.get("use_rslora") else rank)
        tensors[f"{stem}.lora_A.weight"] = mx.contiguous(delta.a.T)
        tensors[f"{stem}.lora_B.weight"] = mx.contiguous(delta.b.T) / scale
        if delta.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = delta.magnitude
    name = "adapters" if layout == "mlx" else "adapter_model"
    mx.save_safetensors(str(folder / f"{name}.safetensors"), tensors)
    how = (
        LORA | {"fine_tune_type": "dora" if dora else "lora"}
        if layout == "mlx"
        else {
            **{"peft_type": "LORA", "r": 3, "lora_alpha": 6, "use_dora": dora},
            "rank_pattern": {name: len(d.b) for name, d in adapter.deltas.items() if len(d.b) != 3},
        }
    )
    (folder / "adapter_config.json").write_text(json.dumps(how | config))
    return folder
