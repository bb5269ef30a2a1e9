"""Memory bandwidth of Apple's chips, and the decoding speed it predicts."""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9

BANDWIDTHS = {
    **{"M1": 68, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800},
    **{"M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800},
    **{"M3": 100, "M3 Pro": 150, "M3 Max": 400, "M3 Ultra": 819},
    **{"M4": 120, "M4 Pro": 273, "M4 Max": 546},
    **{"M5": 153, "M5 Pro": 307, "M5 Max": 614},
}
"""GB/s by chip, for the variant with most cores; published by Apple."""

PUBLISHED = {"M5 Max": 212.0, "M1 Ultra": 148.0}
"""Tokens/s of mlx-lm 0.31.3 with MiniCPM-2B in llama format, 4 bits, pp512 and tg128; measured by
lablup/mlxcel, 2026-09."""

SHARE = 0.85
"""Share of the bandwidth that large matrix-vector products reach; an assumption."""

LLAMA_KERNELS = 689
"""Kernels for a token of mlx-lm's Llama of 40 layers, counted by benchmarks/kernels.py."""

OPERATIONS = 26
"""Operations that a GPU computes while it reads a byte: those of M1 Pro, Max and Ultra, by Apple's
figures (5.2 TFLOPS and 200 GB/s); M1 has 38, of later chips Apple publishes none."""

PUBLISHED_DEPTH = 576
"""Average tokens of context in the published figures."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory traffic and kernels for a token."""

    weights: int
    """Bytes of weights read for each token."""
    cache: int
    """Bytes of keys and values, or of latents, for each token of context. Each is read once: what
    a layer reads again comes from the chip's cache."""
    kernels: int
    operations: int = 0
    """Of attention, for each token of context."""

    def bytes_at(self, depth: float) -> float:
        """Bytes read at `depth` tokens of context, or, if attention takes longer to compute, as
        many as are read in that time."""
        return self.weights + max(self.cache, self.operations / OPERATIONS) * depth


def bandwidth(chip: str) -> float | None:
    """GB/s of a chip by its name in the system, such as "Apple M3 Max"."""
    return BANDWIDTHS.get(chip.removeprefix("Apple ").strip())


def expected(chip: str, cost: Footprint, depth: float) -> float:
    """Predicted tokens/s of a chip at `depth` tokens of context.

    A token takes the time to read its bytes at SHARE of the bandwidth, plus a launch for each
    kernel.
    """
    seconds = cost.bytes_at(depth) / (BANDWIDTHS[chip] * GB * SHARE)
    return 1 / (seconds + cost.kernels * launch(chip))


def launch(chip: str) -> float:
    """Seconds that a kernel adds to a token.

    For M1 and M5, the published time minus the time to read the bytes; for the generations between
    them, interpolated in equal steps.
    """
    oldest, newest = (_launch(name) for name in ("M1 Ultra", "M5 Max"))
    generation = int(chip[1])
    return oldest + (newest - oldest) * (generation - 1) / 4


def _launch(chip: str) -> float:
    read = MINICPM_2B.bytes_at(PUBLISHED_DEPTH) / (BANDWIDTHS[chip] * GB * SHARE)
    return (1 / PUBLISHED[chip] - read) / LLAMA_KERNELS


MINICPM_2B = Footprint(weights=1_534_000_000, cache=40 * 2 * 36 * 64 * 2, kernels=453)
"""4 bits with groups of 64, keys and values in 16 bits; kernels as counted by
benchmarks/kernels.py."""
