"""A checkpoint as its files hold it, to be turned into another one without being in memory whole.

Conversions take a Checkpoint and give a Checkpoint: each of their tensors is made when it is
loaded, from those it comes from. `write` loads one shard after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..model.config import Config
from ..model.config_sections import Quantization
from .lazy_tensor import LazyTensor
from .load import packings, read_checked

SHARD = 5 << 30
"""Bytes of tensors a file holds at most, as mlx-lm and transformers cut them."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model's config.json and its tensors."""

    raw: dict[str, Any]
    """config.json."""
    tensors: Mapping[str, LazyTensor]
    """By their names in the file. The arrays of a packed matrix are in MLX's form."""

    @property
    def config(self) -> Config:
        """The config, read; ConfigError where it cannot be."""
        return Config.from_dict(self.raw)

    @property
    def packings(self) -> dict[str, Quantization]:
        """How each module that is packed is packed, by its path."""
        return packings(self.tensors, self.config)


def read_checkpoint(folder: Path, weights: str | None = None) -> Checkpoint:
    """The checkpoint in `folder`, checked to be whole; nothing of its tensors is read yet.

    `weights` names a torch file that has no usual name. Raises ConfigError or WeightsError.
    """
    config = Config.load(folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.quantization and raw.get("quantization") is None:  # it was GPTQ's or AWQ's
        raw["quantization"] = asdict(config.quantization)
    raw.pop("quantization_config", None)  # or mlx-lm's second copy
    return Checkpoint(raw=raw, tensors=read_checked(folder, config, weights))


def write_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    shard: int = SHARD,
    progress: Callable[[str], object] = lambda _: None,
) -> None:
    """Write config.json and the tensors to `folder`, which exists, as safetensors.

    A shard's tensors are in memory at once, no more.
    """
    shards = list(_shards(checkpoint.tensors, shard))
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        many = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{many}.safetensors"
        arrays = {name: checkpoint.tensors[name].load() for name in names}
        mx.save_safetensors(str(folder / file), arrays, {"format": "mlx"})
        where |= dict.fromkeys(names, file)
        progress(f"file {number} of {len(shards)}")
        del arrays
    if len(shards) > 1:
        total = sum(map(_size, checkpoint.tensors.values()))
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", checkpoint.raw)


def _shards(tensors: Mapping[str, LazyTensor], most: int) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, tensor in tensors.items():
        if names and held + _size(tensor) > most:
            yield names
            names, held = [], 0
        names.append(name)
        held += _size(tensor)
    yield names


def _size(tensor: LazyTensor) -> int:
    count = tensor.dtype.size
    for size in tensor.shape:
        count *= size
    return count


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
