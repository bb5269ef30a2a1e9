"""Exports adapters to other programs: PEFT's layout, mlx-lm's, or a GGUF file for llama.cpp.

Names are those of the base checkpoint in muP form, which PEFT's users have too. `read_adapter` has
multiplied `b` by the scale, so each layout states a scale of 1.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..arguments import one_of
from ..errors import InvalidArgumentError
from ..files.atomic import check_writable, make_whole, named_errors, write_whole
from ..loading.store import folder_of
from ..model.adapters import Adapter, find_projections, locate_deltas
from ..model.config import Config
from ..model.transformer import Model
from ..model_cards import Card, resolve
from ..weights.adapters import read_adapter
from ..weights.checkpoint import write_json
from ..weights.gguf.lora import write_lora

LAYOUTS = ("peft", "mlx", "gguf")

AdapterFiles = tuple[str, dict[str, mx.array], dict[str, Any]]
"""A layout's file name, its tensors and its adapter_config.json."""


def export_adapter(
    adapter: str | Path, target: str | Path, layout: str, *, model: str | Path
) -> None:
    """Write the adapter in the folder `adapter`, made for `model`, to `target` in another layout.

    `model` is what `load` takes; its weights are not read. `target`, which must not exist, becomes
    a folder, or for "gguf" a file. Raises InvalidArgumentError for what the layout cannot say, what
    `use_adapter` raises, and StorageError where `target` cannot be written.

        export_adapter("adapters", "for-llama.gguf", "gguf", model="minicpm-2b-dpo")
    """
    one_of("format", layout, LAYOUTS)
    target = Path(target)
    if target.exists():
        raise InvalidArgumentError(f"{target} exists; give a name that does not")
    if layout != "gguf" and target.suffix.lower() == ".gguf":
        raise InvalidArgumentError(
            f"{target}: format {layout} is a folder; expected format gguf, or another name"
        )
    check_writable(target, "give another name")
    card = resolve(str(model))
    source = read_adapter(Path(adapter).expanduser())
    config = Config.load(folder_of(card))
    locate_deltas(Model(config), source)  # MLX makes none of its weights
    if layout == "gguf":
        with named_errors(target, "give another name"):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, lambda path: write_lora(path, source, config))
    else:
        files = _peft(source, config, card) if layout == "peft" else _mlx(source, config)
        make_whole(target, lambda folder: _write(folder, *files), "give another folder")


def _write(folder: Path, name: str, tensors: dict[str, mx.array], config: dict[str, Any]) -> None:
    mx.save_safetensors(str(folder / name), tensors, {"format": "pt"})
    write_json(folder / "adapter_config.json", config)


def _peft(adapter: Adapter, config: Config, card: Card) -> AdapterFiles:
    tensors = {}
    for module, delta in adapter.deltas.items():
        stem = f"base_model.model.{module}"
        tensors[f"{stem}.lora_A.weight"] = mx.contiguous(delta.a.T)  # (rank, in)
        tensors[f"{stem}.lora_B.weight"] = mx.contiguous(delta.b.T)  # (out, rank)
        if delta.magnitude is not None:
            tensors[f"{stem}.lora_magnitude_vector"] = delta.magnitude
    ranks = {module: len(delta.b) for module, delta in adapter.deltas.items()}
    [(usual, _)] = Counter(ranks.values()).most_common(1)
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": card.repo or str(card.path or card.name),
        "target_modules": _targets(set(ranks), config),
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_dora": _is_dora(adapter),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    return "adapter_model.safetensors", tensors, settings


def _targets(modules: set[str], config: Config) -> list[str]:
    """PEFT's target_modules: last names if the adapter has all modules of that name, else paths."""
    last = {module.rpartition(".")[2] for module in modules}
    matching = {name for name in find_projections(Model(config)) if name.rpartition(".")[2] in last}
    return sorted(last if matching == modules else modules)


def _mlx(adapter: Adapter, config: Config) -> AdapterFiles:
    """mlx-lm has one rank for all modules: smaller ones are padded with zeros."""
    rank = max(len(delta.b) for delta in adapter.deltas.values())
    tensors, keys, first = {}, set(), config.num_hidden_layers
    for module, delta in adapter.deltas.items():
        padding = rank - len(delta.b)
        tensors[f"{module}.lora_a"] = mx.pad(delta.a, [(0, 0), (0, padding)])  # (in, rank)
        tensors[f"{module}.lora_b"] = mx.pad(delta.b, [(0, padding), (0, 0)])  # (rank, out)
        if delta.magnitude is not None:
            tensors[f"{module}.m"] = delta.magnitude
        match module.split("."):
            case ["model", "layers", number, *inside]:
                first = min(first, int(number))
                keys.add(".".join(inside))
            case _:
                keys.add(module)
    settings = {
        "fine_tune_type": "dora" if _is_dora(adapter) else "lora",
        "num_layers": config.num_hidden_layers - first,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    return "adapters.safetensors", tensors, settings


def _is_dora(adapter: Adapter) -> bool:
    """Whether the adapter is DoRA; InvalidArgumentError if only a part is: no layout has that."""
    kinds = {delta.magnitude is not None for delta in adapter.deltas.values()}
    if len(kinds) > 1:
        raise InvalidArgumentError(
            f"{adapter.folder}: some of its matrices have a magnitude (DoRA) and some have none; "
            "expected one kind; merge it with `minicpm-mlx fuse`"
        )
    return kinds.pop()
