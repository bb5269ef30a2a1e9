"""Reads LoRA and DoRA adapters in the layouts of mlx-lm and PEFT."""

from __future__ import annotations

import hashlib
import json
import math
import re
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..arguments import number, printable, shown
from ..errors import ConfigError, InvalidArgumentError, WeightsError
from ..files.lfs import FOUND, is_pointer
from ..model.adapters import Adapter, LoRADelta
from ..model.base_form import BaseForm
from ..model_cards import Card
from . import pytorch_bin, safetensors
from .lazy_tensor import LazyTensor

FILES = {
    "adapters.safetensors": safetensors.read,
    "adapter_model.safetensors": safetensors.read,
    "adapter_model.bin": pytorch_bin.read,
}
"""mlx-lm's file, and PEFT's."""

FORM = "base_form"
"""Where the form of an adapter's base is recorded (see model/base_form.py): a key of
adapter_config.json, or, since PEFT warns of keys it does not know, of the tensors' header."""

HARMLESS = ("", "true", "false", "none", "gaussian", "eva", "orthogonal")
"""PEFT's initializations that leave the base model as it is; `pissa`, `lora_ga` and others do not,
and those that are not known may not."""

UNREAD = (
    *("fan_in_fan_out", "alora_invocation_tokens", "layer_replication", "lora_bias"),
    *("modules_to_save", "target_parameters", "trainable_token_indices"),
    *("use_bdlora", "use_qalora"),
)
"""PEFT's settings that change what an adapter computes, and are not supported."""

_PARTS = {
    ".lora_a": "a",
    ".lora_b": "b",
    ".m": "m",
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_A.default.weight": "a",
    ".lora_B.default.weight": "b",
    ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
    ".lora_magnitude_vector.default.weight": "m",
}


def find_adapter(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The weight file and the config of the adapter in `folder`; raises as `read_adapter`.

    The tensors are not looked at.
    """
    if not folder.is_dir():
        there = "a file; give the folder that holds it" if folder.exists() else "no such folder"
        if folder.is_file() and folder.suffix.lower() == ".gguf":
            there = "a GGUF file, which llama.cpp reads; give the folder that mlx-lm or PEFT wrote"
        raise WeightsError(f"{folder}: expected an adapter's folder, found {there}")
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        model = "; it is a model: give it as --model" if (folder / "config.json").exists() else ""
        raise WeightsError(
            f"{folder}: no adapter; expected {', '.join(FILES)} beside adapter_config.json{model}"
        )
    return path, _config(folder / "adapter_config.json")


def read_adapter(folder: str | Path) -> Adapter:
    """Read the adapter in `folder`; ConfigError or WeightsError for what is none, or damaged."""
    folder = Path(folder)
    path, config = find_adapter(folder)
    config_path = folder / "adapter_config.json"
    peft = path.name != "adapters.safetensors"
    modules: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in FILES[path.name](path).items():
        ending = max(filter(name.endswith, _PARTS), key=len, default=None)
        if ending is None:
            raise WeightsError(
                f"{path}: {printable(name)} is no part of a LoRA or DoRA adapter; only those can "
                "be put on a model"
            )
        module = name.removesuffix(ending)
        if peft:
            module = module.removeprefix("base_model.model.")
        modules.setdefault(module, {})[_PARTS[ending]] = tensor
    _check_magnitudes(path, config, modules)
    deltas = {
        module: _delta(path, module, parts, _scale(config, config_path, peft, module, parts), peft)
        for module, parts in modules.items()
    }
    if not deltas:
        raise WeightsError(f"{path}: holds no tensors")
    digest = hashlib.sha256(config_path.read_bytes() + path.read_bytes()).hexdigest()[:32]
    return Adapter(
        folder=folder,
        deltas=deltas,
        digest=digest,
        form=_form(config, config_path, path),
        bases=_bases(config, folder),
    )


def recorded_base(card: Card | None, form: BaseForm) -> dict[str, Any]:
    """The name, if it has one, and the form of an adapter's base, for its adapter_config.json."""
    return ({"model": base_name(card)} if card else {}) | {FORM: asdict(form)}


def base_name(card: Card) -> str:
    """A name that `resolve` finds the same model by."""
    if card.path is not None:
        return str(card.path)
    return (
        f"{card.name}@{card.revision}"
        if card.name == card.repo and card.revision != "main"
        else card.name
    )


def bases_of(folder: Path) -> tuple[str, ...]:
    """Names of the model that the adapter in `folder` was trained on; raises as `find_adapter`."""
    return _bases(find_adapter(folder)[1], folder)


def _form(config: dict[str, Any], path: Path, tensors: Path) -> BaseForm | None:
    """The form of the base, if it is recorded."""
    stated = config.get(FORM)
    if stated is None and tensors.suffix == ".safetensors":
        with suppress(ValueError, RecursionError):
            stated = json.loads(safetensors.metadata(tensors).get(FORM, "null"))
    if stated is None:
        return None
    try:
        return BaseForm(**stated)
    except (TypeError, InvalidArgumentError) as error:
        raise ConfigError(
            f"{path}: {FORM} must state format, scale_emb, residual_scale, logit_divisor and "
            f"rms_norm_eps, got {printable(shown(stated))} ({error})"
        ) from None


def _bases(config: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """Names of the base: PEFT's, mlx-lm's, and those in the record of a training here."""
    names = [config.get("base_model_name_or_path"), config.get("model")]
    with suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
        base = json.loads((folder / "training.json").read_text(encoding="utf-8"))["base"]
        names += [base["name"], base["repo"]]
    texts = [name.strip() for name in names if isinstance(name, str)]
    return tuple(dict.fromkeys(filter(None, texts)))


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        found = FOUND if is_pointer(path) else error
        raise ConfigError(f"{path}: expected an adapter's config, found: {found}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: expected a JSON object")
    kind = config.get("fine_tune_type", config.get("peft_type", "lora"))
    if str(kind).lower() not in ("lora", "dora"):
        raise ConfigError(f"{path}: expected a LoRA or DoRA adapter, got {printable(kind)}")
    for name in ("use_dora", "use_rslora"):
        if config.get(name) not in (True, False, None):
            raise ConfigError(
                f"{path}: {name} must be true or false, got {printable(shown(config[name]))}"
            )
    unread = [name for name in UNREAD if config.get(name)]
    if config.get("bias") not in (None, "none"):
        unread.append("bias")
    if unread:
        raise ConfigError(
            f"{path}: {unread[0]} is {printable(shown(config[unread[0]]))}, which is not "
            "supported; expected a plain LoRA or DoRA. Train it without, or merge it with PEFT"
        )
    start = str(config.get("init_lora_weights", "")).lower()
    if start not in HARMLESS:
        raise ConfigError(
            f"{path}: init_lora_weights is {printable(start)}, which changes the base model as "
            "well, or may; save it from PEFT as a plain LoRA "
            "(path_initial_model_for_weight_conversion)"
        )
    return config


def _check_magnitudes(
    path: Path, config: dict[str, Any], modules: dict[str, dict[str, LazyTensor]]
) -> None:
    """ConfigError where the config says DoRA and a module has no magnitudes, or the reverse."""
    stated = config.get("use_dora")
    if "fine_tune_type" in config:
        stated = stated or str(config["fine_tune_type"]).lower() == "dora"
    if stated is None:
        return
    wrong = [module for module, parts in modules.items() if ("m" in parts) != stated]
    if wrong:
        says, has = ("DoRA", "no magnitudes") if stated else ("no DoRA", "magnitudes")
        raise ConfigError(
            f"{path.parent / 'adapter_config.json'}: says {says}, and {printable(wrong[0])} has "
            f"{has}; expected the config that was saved with the matrices"
        )


def _scale(
    config: dict[str, Any], path: Path, peft: bool, module: str, parts: dict[str, LazyTensor]
) -> float:
    """The factor of b (a x): stated by mlx-lm, alpha over rank for PEFT."""
    if not peft:
        parameters = config.get("lora_parameters")
        scale = parameters.get("scale") if isinstance(parameters, dict) else None
        return _number(path, "lora_parameters.scale", scale)
    alpha = _by_module(config, path, module, "alpha_pattern", "lora_alpha")
    shape = parts["a"].shape if "a" in parts else ()
    rank = max(shape[0], 1) if shape else 1
    stated = _by_module(config, path, module, "rank_pattern", "r")
    if stated is not None and _number(path, "r", stated) != rank:
        raise ConfigError(
            f"{path}: r is {printable(stated)} for {printable(module)}, whose matrices have rank "
            f"{rank}; expected the config that was saved with them"
        )
    return _number(path, "lora_alpha", alpha) / (
        math.sqrt(rank) if config.get("use_rslora") else rank
    )


def _by_module(
    config: dict[str, Any], path: Path, module: str, patterns: str, default: str
) -> object:
    """PEFT's setting for a module: that of the first pattern matching the end of its path."""
    by_module = config.get(patterns) or {}
    if not isinstance(by_module, dict):
        raise ConfigError(f"{path}: {patterns} must be an object, got {printable(by_module)}")
    for pattern, value in by_module.items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except (re.error, OverflowError, RecursionError):
            raise ConfigError(
                f"{path}: {patterns} holds {printable(pattern)}, which is no regular expression"
            ) from None
        if matches:
            return value
    return config.get(default)


def _number(path: Path, name: str, value: object) -> float:
    with suppress(InvalidArgumentError):
        if math.isfinite(found := number(name, value)):
            return found
    raise ConfigError(f"{path}: {name} must be a number, got {printable(shown(value))}")


def _delta(
    path: Path, module: str, parts: dict[str, LazyTensor], scale: float, peft: bool
) -> LoRADelta:
    if missing := {"a", "b"} - parts.keys():
        raise WeightsError(f"{path}: {printable(module)} lacks its lora_{min(missing)}")
    ndims = {part: len(tensor.shape) for part, tensor in parts.items()}
    floats = all(mx.issubdtype(tensor.dtype, mx.floating) for tensor in parts.values())
    if ndims | {"m": 1} != {"a": 2, "b": 2, "m": 1} or ndims.get("m", 1) != 1 or not floats:
        raise WeightsError(f"{path}: {printable(module)}: expected two matrices of floats")
    a, b = (parts[part].load().astype(mx.float32) for part in "ab")
    if not (mx.isfinite(a).all() & mx.isfinite(b).all()).item():
        raise WeightsError(f"{path}: {printable(module)}: holds numbers that are not finite")
    if peft:
        a, b = a.T, b.T
    if a.shape[1] != b.shape[0]:
        raise WeightsError(
            f"{path}: {printable(module)}: lora_a has rank {a.shape[1]} and lora_b {b.shape[0]}"
        )
    magnitude = parts["m"].load().astype(mx.float32) if "m" in parts else None
    return LoRADelta(a=a, b=b * scale, magnitude=magnitude)
