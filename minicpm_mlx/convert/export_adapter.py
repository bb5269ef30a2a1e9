"""Exports adapters to other programs: PEFT's layout, mlx-lm's, or a GGUF file for llama.cpp.

The result is for one form of the base (see model/base_form.py), since those programs rescale
nothing; it records which. `read_adapter` has multiplied `b` by the scale, so each layout states a
scale of 1.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from ..arguments import one_of
from ..errors import InvalidArgumentError
from ..files.atomic import check_writable, make_whole, named_errors, write_whole
from ..loading.adapters import fit_adapter
from ..loading.store import folder_of
from ..model.adapters import Adapter, find_projections, locate_deltas, rescaled
from ..model.base_form import FORMATS, BaseForm, config_in
from ..model.config import Config
from ..model.transformer import Model
from ..model_cards import Card, resolve
from ..weights.adapters import FORM, base_name, read_adapter, recorded_base
from ..weights.checkpoint import write_json
from ..weights.gguf.lora import write_lora
from ..weights.llama_format import check_plain, check_rotation

LAYOUTS = ("peft", "mlx", "gguf")


def export_adapter(
    adapter: str | Path,
    target: str | Path,
    layout: str,
    *,
    model: str | Path,
    base_format: str | None = None,
) -> BaseForm:
    """Write the adapter in the folder `adapter` to `target` in another layout, for `model`.

    `model` is what `load` takes; its weights are not read. `base_format` ("mup", "llama" or "mlx")
    makes it for what `convert` makes of that model instead. `target`, which must not exist, becomes
    a folder, or for "gguf" a file. Returns the form of the base that the result is for. Raises
    InvalidArgumentError for what the layout cannot say, what `use_adapter` raises, and StorageError
    where `target` cannot be written.

        export_adapter("adapters", "for-llama.gguf", "gguf", model="minicpm-2b-dpo")
    """
    target = Path(target)
    check(target, layout, base_format)
    card = resolve(str(model))
    source = read_adapter(Path(adapter).expanduser())
    config = Config.load(folder_of(card))
    source = fit_adapter(source, config, card)
    locate_deltas(Model(config), source)  # MLX makes none of its weights
    form = source.form or BaseForm.of(config)
    base: Card | None = card
    if base_format is not None and base_format != form.format:
        config, base = _config_in(config, base_format), None
        source = rescaled(source, form, BaseForm.of(config))
        form = BaseForm.of(config)
    if layout == "gguf":
        with named_errors(target, "give another name"):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, lambda path: write_lora(path, source, config))
        return form
    write = _write_peft if layout == "peft" else _write_mlx
    make_whole(
        target, lambda folder: write(folder, source, config, base, form), "give another folder"
    )
    return form


def check(target: Path, layout: str, base_format: str | None = None) -> None:
    """Raise what can be known of `export_adapter`'s arguments before a model is fetched."""
    one_of("format", layout, LAYOUTS)
    if base_format is not None:
        one_of("base_format", base_format, FORMATS)
    if target.exists():
        raise InvalidArgumentError(f"{target} exists; give a name that does not")
    if layout != "gguf" and target.suffix.lower() == ".gguf":
        raise InvalidArgumentError(
            f"{target}: format {layout} is a folder; expected format gguf, or another name"
        )
    check_writable(target, "give another name")


def _config_in(config: Config, base_format: str) -> Config:
    if base_format != "mup":
        check_plain(config, base_format)
        check_rotation(config, base_format)
    return config_in(config, base_format)


def _write_peft(
    folder: Path, adapter: Adapter, config: Config, base: Card | None, form: BaseForm
) -> None:
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
        "base_model_name_or_path": base and (base.repo or base_name(base)),
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
    # Not in adapter_config.json, since PEFT warns of keys that it does not know.
    header = {"format": "pt", FORM: json.dumps(asdict(form))}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors, header)
    write_json(folder / "adapter_config.json", settings)


def _targets(modules: set[str], config: Config) -> list[str]:
    """PEFT's target_modules: last names if the adapter has all modules of that name, else paths."""
    last = {module.rpartition(".")[2] for module in modules}
    matching = {name for name in find_projections(Model(config)) if name.rpartition(".")[2] in last}
    return sorted(last if matching == modules else modules)


def _write_mlx(
    folder: Path, adapter: Adapter, config: Config, base: Card | None, form: BaseForm
) -> None:
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
        **recorded_base(base, form),
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors, {"format": "mlx"})
    write_json(folder / "adapter_config.json", settings)


def _is_dora(adapter: Adapter) -> bool:
    """Whether the adapter is DoRA; InvalidArgumentError if only a part is: no layout has that."""
    kinds = {delta.magnitude is not None for delta in adapter.deltas.values()}
    if len(kinds) > 1:
        raise InvalidArgumentError(
            f"{adapter.folder}: some of its matrices have a magnitude (DoRA) and some have none; "
            "expected one kind; merge it with `minicpm-mlx fuse`"
        )
    return kinds.pop()
