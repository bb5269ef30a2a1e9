"""Checkpoints: config.json and lazy tensors, read from a folder and written to another.

A conversion takes a Checkpoint and returns one. Its tensors are computed when they are loaded, so a
model is never in memory whole: `write_checkpoint` loads one shard after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..model.config import Config
from ..model.config_sections import Quantization
from .config_file import written
from .lazy_tensor import LazyTensor
from .load import packings, read_checked

SHARD = 5 << 30
"""Most bytes of tensors in a file; mlx-lm and transformers use the same limit."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model's config.json and its tensors."""

    raw: dict[str, Any]
    """config.json."""
    tensors: Mapping[str, LazyTensor]
    """By their names in the file. The arrays of a packed matrix are in MLX's form."""

    @property
    def config(self) -> Config:
        """The parsed config; ConfigError if it is malformed."""
        return Config.from_dict(self.raw)

    @property
    def packings(self) -> dict[str, Quantization]:
        """The packing of each quantized module, by path."""
        return packings(self.tensors, self.config)


def read_checkpoint(folder: Path, weights: str | None = None) -> Checkpoint:
    """The checkpoint in `folder`, checked for completeness; tensor data is not read yet.

    `weights` names a torch file that has no standard name. Raises ConfigError or WeightsError.
    """
    config = Config.load(folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.quantization and raw.get("quantization") is None:  # it was GPTQ's or AWQ's
        raw["quantization"] = asdict(config.quantization)
    raw.pop("quantization_config", None)  # GPTQ's, AWQ's, or mlx-lm's second copy
    return Checkpoint(raw=raw, tensors=read_checked(folder, config, weights))


def write_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    shard: int = SHARD,
    progress: Callable[[str], object] = lambda _: None,
) -> None:
    """Write config.json and the tensors to `folder`, which exists, as safetensors.

    Only one shard, of at most `shard` bytes, is in memory at a time.
    """
    shards = list(_shards(checkpoint.tensors, shard))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{suffix}.safetensors"
        arrays = {name: checkpoint.tensors[name].load() for name in names}
        mx.save_safetensors(str(folder / file), arrays, {"format": "mlx"})
        weight_map |= dict.fromkeys(names, file)
        progress(f"file {number} of {len(shards)}")
        del arrays
    if len(shards) > 1:
        total = sum(map(_size, checkpoint.tensors.values()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", written(checkpoint.raw))


def _shards(tensors: Mapping[str, LazyTensor], limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + _size(tensor) > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += _size(tensor)
    yield names


def _size(tensor: LazyTensor) -> int:
    return prod(tensor.shape) * tensor.dtype.size


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
