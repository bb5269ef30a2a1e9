"""Forecasts what a model that is not here would take of this machine, and its speed."""

from __future__ import annotations

import time
from dataclasses import dataclass

import mlx.core as mx

from .. import device
from ..loading import download
from ..loading.plan import kept_config, with_packing
from ..memory import MemoryEstimate, estimate, packed_bytes
from ..model.config import Config
from ..model_cards import Card
from .chips import BANDWIDTHS, GB, MINICPM_2B, Footprint, expected
from .footprint import footprint
from .shapes import SHAPES

TYPICAL_CONTEXT = 4096
"""Tokens of conversation that a model's memory is stated for."""
SHARE_OF_WORK = 0.1
"""Of the weights, for a short conversation of a model whose shape is unknown."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a model would take of this machine."""

    download: int
    """Bytes."""
    memory: int
    """Bytes for a conversation of TYPICAL_CONTEXT tokens."""
    cost: Footprint
    """Of a token."""
    available: int
    """Bytes of free memory now."""

    @property
    def fits(self) -> bool:
        return self.memory <= self.available

    @property
    def expected_speed(self) -> float | None:
        """Tokens a second of one stream; None on another chip than Apple's."""
        chip = device.chip().removeprefix("Apple ").strip()
        if chip not in BANDWIDTHS or device.on_cpu():
            return None
        return expected(chip, self.cost, 0)

    @property
    def speed(self) -> float:
        """As `expected_speed`; on another chip measured, in 0.1 s or so."""
        return self.expected_speed or _measured_bandwidth() / self.cost.weights


def forecast(card: Card) -> Forecast:
    """The forecast for a repository; the hub is asked for a size that its card does not state.

    Where neither the model nor its shape is known, its weights are judged by the download's size,
    of 16 bits each. Errors as of `download.remote_size`.
    """
    size = (
        int(card.size_gb * GB)
        if card.size_gb is not None
        else download.remote_size(str(card.repo), card.revision, weights=card.file, tag=card.tag)
    )
    device.select()
    config, available = known_config(card), device.available_memory()
    if config is not None:
        stored = mx.bfloat16 if config.quantization is None else mx.float16
        cost = footprint(config, device.choose_dtype(stored))
        memory = _typical(config, card).total
        return Forecast(download=size, memory=memory, cost=cost, available=available)
    weights = packed_bytes(int(size / (card.width or 2)), None, device.choose_dtype(mx.bfloat16))
    return Forecast(
        download=size,
        memory=int(weights * (1 + SHARE_OF_WORK)),
        cost=Footprint(weights=weights, cache=0, kernels=MINICPM_2B.kernels),
        available=available,
    )


def memory_needed(card: Card) -> MemoryEstimate | None:
    """The memory of a conversation of TYPICAL_CONTEXT tokens; None where the shape is unknown.

    ConfigError for a folder without a valid config.
    """
    device.select()
    config = known_config(card)
    return None if config is None else _typical(config, card)


def known_config(card: Card) -> Config | None:
    """The config by which a model runs: of its files where they are here, else the card's shape.

    None where neither is known; ConfigError for a folder without a valid config.
    """
    if (config := kept_config(card)) is not None or card.shape not in SHAPES:
        return config
    return with_packing(Config.from_dict(SHAPES[card.shape]), card)


def _typical(config: Config, card: Card) -> MemoryEstimate:
    return estimate(config, context=min(TYPICAL_CONTEXT, card.context or TYPICAL_CONTEXT))


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
