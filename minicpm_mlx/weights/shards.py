"""Reads the tensors of a checkpoint from the files that hold its weights."""

from __future__ import annotations

from pathlib import Path

from ..arguments import printable
from ..errors import WeightsError
from ..files.lfs import FOUND, is_pointer
from ..files.weight_files import WeightFiles, files_in
from . import pytorch_bin, safetensors
from .lazy_tensor import LazyTensor


def read(folder: Path, weights: str | None = None) -> dict[str, LazyTensor]:
    """Every tensor of the checkpoint in `folder`, by name; data is read when it is loaded.

    `weights` names the one file to read, in torch's format, where it has no usual name.
    """
    if weights is not None:
        return pytorch_bin.read(folder / weights)
    try:
        found = files_in(folder)
    except (OSError, ValueError) as error:
        indices = [path for path in folder.glob("*.index.json") if is_pointer(path)]
        problem = f"{folder}/{error}" if type(error) is ValueError else f"{folder}: {error}"
        problem = f"{indices[0]}: expected an index, found {FOUND}" if indices else problem
        raise WeightsError(problem) from None
    if found is None:
        raise WeightsError(
            f"{folder}: no weights; expected model.safetensors or pytorch_model.bin, or shards of "
            "one with their index"
        )
    tensors = _merge(folder, found)
    # With every tensor of the index in other files, the index is out of date, and no shard missing.
    if found.missing and not (found.index and set(found.tensors) <= tensors.keys()):
        named = f"named by {found.index}" if found.index else "numbered so"
        raise WeightsError(f"{folder / printable(found.missing)}: missing, but {named}")
    return tensors


def _merge(folder: Path, found: WeightFiles) -> dict[str, LazyTensor]:
    merged: dict[str, LazyTensor] = {}
    for name in found.files:
        reader = safetensors.read if name.endswith(".safetensors") else pytorch_bin.read
        tensors = reader(folder / name)
        if twice := merged.keys() & tensors.keys():
            raise WeightsError(
                f"{folder / name}: {printable(min(twice))} is in another shard as well"
            )
        merged.update(tensors)
    return merged
