"""Which files of a folder hold the weights, and what tensors are in them."""

from __future__ import annotations

import json
from pathlib import Path

from ..arguments import printable
from ..errors import WeightsError
from . import pytorch_bin, safetensors
from .lazy_tensor import LazyTensor

FORMATS = {"safetensors": ("model", safetensors.read), "bin": ("pytorch_model", pytorch_bin.read)}
"""By file ending, in order of preference: the usual stem, and the reader."""


def read(folder: Path, weights: str | None = None) -> dict[str, LazyTensor]:
    """Every tensor of the checkpoint in `folder`, by name; data is read when it is loaded.

    `weights` names the one file to read, in torch's format, where it has no usual name.
    """
    if weights is not None:
        return pytorch_bin.read(folder / weights)
    for ending, (stem, reader) in FORMATS.items():
        index = folder / f"{stem}.{ending}.index.json"
        if index.exists():
            return _read_sharded(index, ending)
        if paths := _unindexed(folder, stem, ending):
            return _merge({path: reader(path) for path in paths})
    raise WeightsError(
        f"{folder}: no weights; expected model.safetensors or pytorch_model.bin, or shards of one "
        "with their index"
    )


def _unindexed(folder: Path, stem: str, ending: str) -> list[Path]:
    """The one file, or shards whose index was lost (mlx-lm once wrote weights.00.safetensors)."""
    single = folder / f"{stem}.{ending}"
    if single.exists():
        return [single]
    patterns = [f"{stem}-?????-of-?????.{ending}", f"weights.*.{ending}"]
    return sorted(path for pattern in patterns for path in folder.glob(pattern))


def _read_sharded(index: Path, ending: str) -> dict[str, LazyTensor]:
    reader = FORMATS[ending][1]
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(name): str(file) for name, file in where.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise WeightsError(
            f'{index}: expected {{"weight_map": {{tensor: file}}}}; download it again'
        ) from None
    beside = {path.name for path in index.parent.iterdir()}
    shards: dict[Path, dict[str, LazyTensor]] = {}
    for file in sorted(set(names.values())):
        if Path(file).name != file or not file.endswith(f".{ending}"):
            raise WeightsError(f"{index}: {file!r} is not the name of a .{ending} file beside it")
        if file not in beside:
            raise WeightsError(
                f"{index.parent / printable(file)}: missing, but named by {index.name}"
            )
        shards[index.parent / file] = reader(index.parent / file)
    tensors = _merge(shards)
    missing = [name for name in names if name not in shards[index.parent / names[name]]]
    if missing:
        raise WeightsError(
            f"{index.parent / names[missing[0]]}: does not hold {printable(missing[0])}, which "
            f"{index.name} places there"
        )
    return tensors


def _merge(shards: dict[Path, dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    merged: dict[str, LazyTensor] = {}
    for path, tensors in shards.items():
        if twice := merged.keys() & tensors.keys():
            raise WeightsError(f"{path}: {printable(min(twice))} is in another shard as well")
        merged.update(tensors)
    return merged
