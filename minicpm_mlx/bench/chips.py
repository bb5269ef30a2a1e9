"""Memory bandwidth of Apple's chips, and what it lets one expect of them."""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9

BANDWIDTHS = {
    "M1": 68,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M1 Ultra": 800,
    "M2": 100,
    "M2 Pro": 200,
    "M2 Max": 400,
    "M2 Ultra": 800,
    "M3": 100,
    "M3 Pro": 150,
    "M3 Max": 400,
    "M3 Ultra": 819,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max": 546,
    "M5": 153,
    "M5 Pro": 307,
    "M5 Max": 614,
}
"""GB/s by chip, of the variant with most cores; Apple's figures."""

PUBLISHED = {"M5 Max": 212.0, "M1 Ultra": 148.0}
"""Tokens/s that mlx-lm 0.31.3 was measured to decode MiniCPM-2B with, 4 bits, pp512 and tg128, in
llama format; lablup/mlxcel, 2026-09."""

SHARE = 0.85
"""Of the bandwidth that large matrix-vector products reach; an assumption."""

LLAMA_KERNELS = 689
"""A token, of mlx-lm's Llama of 40 layers; benchmarks/kernels.py counts them."""

PUBLISHED_DEPTH = 576
"""Tokens of context, on average, of the published figures."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a token costs in memory traffic and kernels."""

    weights: int
    """Bytes read for each token."""
    cache: int
    """Bytes of keys and values for each token of context."""
    kernels: int

    def bytes_at(self, depth: float) -> float:
        return self.weights + self.cache * depth


def bandwidth(chip: str) -> float | None:
    """GB/s of a chip by the name the system gives it, such as "Apple M3 Max"."""
    return BANDWIDTHS.get(chip.removeprefix("Apple ").strip())


def expected(chip: str, cost: Footprint, depth: float) -> float:
    """Tokens/s to expect of a chip at `depth` tokens of context: a plan, not a measurement.

    A token takes as long as its bytes need at SHARE of the bandwidth, and a launch for each kernel.
    """
    seconds = cost.bytes_at(depth) / (BANDWIDTHS[chip] * GB * SHARE)
    return 1 / (seconds + cost.kernels * launch(chip))


def launch(chip: str) -> float:
    """Seconds a kernel adds to a token: what is left of the published figures, for M1 and M5, once
    the bytes are accounted for; between those, by generation in equal steps."""
    oldest, newest = (_launch(name) for name in ("M1 Ultra", "M5 Max"))
    generation = int(chip[1])
    return oldest + (newest - oldest) * (generation - 1) / 4


def _launch(chip: str) -> float:
    read = MINICPM_2B.bytes_at(PUBLISHED_DEPTH) / (BANDWIDTHS[chip] * GB * SHARE)
    return (1 / PUBLISHED[chip] - read) / LLAMA_KERNELS


MINICPM_2B = Footprint(weights=1_534_000_000, cache=40 * 2 * 36 * 64 * 2, kernels=533)
"""In 4 bits with groups of 64, keys and values in 16 bits; kernels as benchmarks/kernels.py counts
them."""
