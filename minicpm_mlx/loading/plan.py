"""The config by which a model's memory is planned before it is loaded."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from ..errors import WeightsError
from ..model.config import Config
from ..model.config_sections import PACKINGS, Quantization
from ..model_cards import Card
from ..weights import shards
from .store import kept_folder

OUTER = ("model.embed_tokens", "lm_head")
"""Matrices that method exact leaves as they are, where they are not ternary."""


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
    return replace(config, quantization=_published_packing(card))


def _published_packing(card: Card) -> Quantization | None:
    """How the download is packed, by the width of its weights."""
    bits, group_sizes = PACKINGS["affine"]
    ways = (Quantization(bits=b, group_size=g) for b in bits for g in group_sizes)
    return next((way for way in ways if way.bits_per_weight / 8 == card.width), None)
