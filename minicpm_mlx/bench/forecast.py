"""Forecasts what a model that is not here would take of this machine, and its speed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from .. import device
from ..loading import download
from ..memory import MemoryEstimate, estimate, packed_bytes
from ..model.config import Config
from ..model.config_sections import Quantization
from ..model_cards import Card
from .chips import BANDWIDTHS, GB, MINICPM_2B, Footprint, expected
from .shapes import SHAPES

TYPICAL_CONTEXT = 4096
"""Tokens of conversation that a model's memory is stated for."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes."""

    download: int
    weights: int
    """In memory."""
    read: int
    """Of them, for each token."""
    available: int
    """Free memory now."""

    @property
    def fits(self) -> bool:
        """Whether the weights fit, with a tenth more for a short conversation."""
        return self.weights * 1.1 <= self.available

    @property
    def expected_speed(self) -> float | None:
        """Tokens a second of one stream; None on another chip than Apple's."""
        chip = device.chip().removeprefix("Apple ").strip()
        if chip not in BANDWIDTHS or device.on_cpu():
            return None
        return expected(chip, Footprint(weights=self.read, cache=0, kernels=MINICPM_2B.kernels), 0)

    @property
    def speed(self) -> float:
        """As `expected_speed`; on another chip measured, in 0.1 s or so."""
        return self.expected_speed or _measured_bandwidth() / self.read


def forecast(card: Card) -> Forecast:
    """The forecast for a repository; the hub is asked for a size that its card does not state.

    Weights of an unknown width are taken for 16 bits. Errors as of `download.remote_size`.
    """
    size = (
        int(card.size_gb * GB)
        if card.size_gb is not None
        else download.remote_size(str(card.repo), card.revision, weights=card.file)
    )
    device.select()
    packing = _packing(card)
    compute = device.choose_dtype(mx.bfloat16 if packing is None else mx.float16)
    weights = packed_bytes(int(size / (card.width or 2)), packing, compute)
    return Forecast(
        download=size,
        weights=weights,
        read=int(weights * (card.active or 1)),
        available=device.available_memory(),
    )


def memory_needed(card: Card, folder: Path | None = None) -> MemoryEstimate | None:
    """The memory of a conversation of TYPICAL_CONTEXT tokens, before the download.

    From the model's config where it lies in `folder`, else from the card's shape; None where
    neither is known. ConfigError for a folder without a valid config.
    """
    if folder is not None:
        config = Config.load(folder)
    elif card.shape in SHAPES:
        shape = Config.from_dict(SHAPES[card.shape])
        config = replace(shape, quantization=_packing(card))
    else:
        return None
    device.select()
    return estimate(config, context=min(TYPICAL_CONTEXT, card.context or TYPICAL_CONTEXT))


def _packing(card: Card) -> Quantization | None:
    """How the weights are packed when the model runs."""
    if card.bits is not None and card.group_size is not None:
        return Quantization(bits=card.bits, group_size=card.group_size)
    if card.width is not None and card.width < 1:
        return Quantization(bits=4, group_size=64)
    return None


def _measured_bandwidth() -> float:
    """Bytes a second of a product with one row, the best of three."""
    matrix, row = mx.ones((4096, 8192), mx.float32), mx.ones((8192, 1), mx.float32)
    mx.eval(matrix, row)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(matrix @ row)
        seconds.append(time.perf_counter() - start)
    return matrix.nbytes / min(seconds)
