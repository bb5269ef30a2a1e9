"""The config by which a model's memory is planned before it is loaded."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace

from ..errors import WeightsError
from ..model.config import Config
from ..model.config_sections import PACKINGS, Quantization
from ..model_cards import Card
from ..weights import shards
from .store import kept_folder

OUTER = ("model.embed_tokens", "lm_head")
"""Matrices that GPTQ and AWQ leave as they are, and method exact where they are not ternary."""


def kept_config(card: Card) -> Config | None:
    """The config of a model on this disk, with the matrices that its files do not pack; None where
    it is not here. ConfigError for a folder without a valid config."""
    folder = kept_folder(card)
    if folder is None or not folder.is_dir():
        return None
    config = Config.load(folder)
    if config.quantization is None:
        return config
    with suppress(WeightsError):  # loading it says so
        tensors = shards.read(folder, card.file if card.repo else None)
        dense = [
            name.removesuffix(".weight")
            for name, tensor in tensors.items()
            if name.endswith(".weight") and len(tensor.shape) == 2
        ]
        unpacked = tuple(path for path in dense if f"{path}.scales" not in tensors)
        return replace(config, unpacked=unpacked)
    return config


def with_packing(config: Config, card: Card) -> Config:
    """A published model's config, packed as it runs: after the download, or as it is published."""
    if config.quantization is not None:
        return config
    if card.bits is not None and card.group_size is not None:
        packing = Quantization(bits=card.bits, group_size=card.group_size)
        return replace(config, quantization=packing, unpacked=OUTER * (card.method == "exact"))
    if card.size_gb is None:
        return _as_sibling(config, card)
    return replace(config, quantization=_published_packing(card))


def _as_sibling(config: Config, card: Card) -> Config:
    """Packed as a repository that has no card but holds a carded model in few bits: as many as the
    tag of a GGUF file names, such as Q8_0, else 4."""
    named = re.search(r"Q(\d)|F(16|32)", card.tag.upper()) if card.tag else None
    if named and named[2]:
        return config
    bits = int(named[1]) if named else 4
    packing = Quantization(bits=bits if bits in PACKINGS["affine"][0] else 4, group_size=64)
    unpacked = OUTER * card.name.upper().endswith(("GPTQ", "AWQ"))
    return replace(config, quantization=packing, unpacked=unpacked)


def _published_packing(card: Card) -> Quantization | None:
    """How the download is packed, by the width of its weights."""
    bits, group_sizes = PACKINGS["affine"]
    ways = (Quantization(bits=b, group_size=g) for b in bits for g in group_sizes)
    return next((way for way in ways if way.bits_per_weight / 8 == card.width), None)
