"""Drawing without a sort: the tokens kept are those a sort keeps, each as often as it should."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import product
from statistics import NormalDist
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from minicpm_mlx.engine.draw import UNDECIDED, Draw

KINDS = ("plain", "ties", "flat", "peaked", "masked", "16 bits", "ascending")
TRIED = [210, pytest.param(10_000, marks=pytest.mark.slow)]


def random_logits(rng: np.random.Generator, kind: str) -> np.ndarray:
    logits = rng.normal(size=int(rng.integers(2, 3000))) * rng.choice([0.01, 0.5, 1, 2, 3, 5])
    match kind:
        case "ties":
            logits = np.round(logits)
        case "flat":
            logits[:] = 0
        case "peaked":
            logits[rng.integers(logits.size)] = 12
        case "masked":
            logits[rng.random(logits.size) < 0.97] = -np.inf
            logits[rng.integers(logits.size)] = 1
        case "16 bits":
            logits = logits.astype(np.float16)
        case "ascending":
            logits = np.sort(logits)
    return logits.astype(np.float32)


def random_settings(rng: np.random.Generator) -> dict[str, Any]:
    return {
        "temperature": float(rng.choice([0.3, 0.8, 1, 1.5])),
        "top_k": int(rng.choice([0, 0, 1, 20, 127, 500])),
        "top_p": float(rng.choice([0.1, 0.5, 0.8, 0.95, 1])),
        "min_p": float(rng.choice([0, 0, 0.05, 0.3])),
    }


class Sorted:
    """What a full sort in float64 says."""

    def __init__(
        self, logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
    ):
        order = np.argsort(-logits, kind="stable")
        ranked = logits[order].astype(np.float64)
        p = np.exp((ranked - ranked[0]) / temperature)
        if top_k:
            p[top_k:] = 0
        p /= p.sum()
        before = np.cumsum(p) - p
        allowed = p * (p >= min_p * p[0])
        kept = allowed * (before < top_p)
        self.kept = order[: np.count_nonzero(kept)]
        """Best first."""
        self.rest = order[len(self.kept) : np.count_nonzero(allowed)]
        """Those that only top_p drops."""
        self.probabilities = np.zeros(len(p))
        self.probabilities[order] = kept / kept.sum()
        self.allowed = np.zeros(len(p))
        """Of each token among those that top_k and min_p allow."""
        self.allowed[order] = allowed / allowed.sum()
        thresholds = np.abs(before - top_p) if top_p < 1 else np.ones(1)
        ratios = np.abs(p / p[0] / min_p - 1) if min_p else np.ones(1)
        # Draw takes 1e-6 off top_p, and its numbers have 24 and 32 bits.
        drawn = self.allowed[[self.kept[-1], *self.rest[:1]]]
        self.is_close = bool(thresholds.min() < 4e-6 or ratios.min() < 1e-5)
        self.is_close |= bool(drawn.min() < 1e-6)

    def share(self, token: int) -> float:
        """The random share of all allowed tokens that hits this one."""
        return float(np.cumsum(self.allowed)[token] - self.allowed[token] / 2)


def host_first(
    draw: Draw, logits: np.ndarray, share: float, monkeypatch: pytest.MonkeyPatch
) -> int | None:
    """The token that this share hits; None where it is not taken."""
    shares = iter([share])

    class Generator:
        def random(self) -> float:
            return next(shares)

    monkeypatch.setattr(np.random, "default_rng", lambda _: Generator())
    try:
        return draw.on_host(logits, np.zeros(2, np.uint32))
    except StopIteration:
        return None


def device_first(draw: Draw, logits: np.ndarray, share: float, _: Any) -> int | None:
    random = mx.array([int(share * 2**32)] * draw.tries, mx.uint32)
    token = int(draw.on_device(mx.array(logits), random).item())
    return None if token == UNDECIDED else token


@pytest.mark.parametrize("first", [host_first, device_first])
@pytest.mark.parametrize("count", TRIED)
def test_the_last_token_kept_is_taken_and_the_next_is_not(
    first: Callable[..., int | None], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the tokens kept are exactly those of the sort, where rounding does not decide."""
    rng = np.random.default_rng(count)
    compared = 0
    for i in range(count):
        logits, how = random_logits(rng, KINDS[i % len(KINDS)]), random_settings(rng)
        expected, draw = Sorted(logits, **how), Draw(logits.size, **how)
        if expected.is_close:
            continue
        compared += 1
        last = int(expected.kept[-1])
        assert first(draw, logits, expected.share(last), monkeypatch) == last, (i, how)
        if len(expected.rest):
            share = expected.share(int(expected.rest[0]))
            assert first(draw, logits, share, monkeypatch) is None, (i, how)
    assert compared > count / 2


GRID = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for temperature, top_k, top_p, min_p in product((0.7, 1.3), (0, 8), (0.8, 1.0), (0.0, 0.05))
]


def p_value(counts: Counter[int], expected: np.ndarray) -> float:
    """Of chi-squared, rare tokens as one; Wilson and Hilferty's approximation."""
    total = sum(counts.values())
    often = np.flatnonzero(expected * total >= 5)
    seen = np.array([counts[int(t)] for t in often], float)
    mean = expected[often] * total
    if total - mean.sum() >= 5:
        seen, mean = np.append(seen, total - seen.sum()), np.append(mean, total - mean.sum())
    freedom = len(mean) - 1
    if freedom == 0:
        return 1.0
    chi = float(((seen - mean) ** 2 / mean).sum())
    z = ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 1 - NormalDist().cdf(z)


@pytest.mark.parametrize("on_host", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("draws", [200, pytest.param(5_000, marks=pytest.mark.slow)])
def test_tokens_are_drawn_as_often_as_their_probabilities_say(on_host: bool, draws: int) -> None:
    """Sixteen settings, each at p > 0.01 / 16."""
    rng = np.random.default_rng(7)
    logits = (rng.normal(size=300) * 1.5).astype(np.float32)
    logits[rng.permutation(300)[:12]] += 4
    array = mx.array(logits)
    for how in GRID:
        draw, counts = Draw(300, **how), Counter[int]()  # type: ignore[arg-type]
        key = mx.random.key(3)
        for _ in range(draws):
            key, random = draw.split(key)
            token = UNDECIDED if on_host else int(draw.on_device(array, random).item())
            if token == UNDECIDED:
                token = draw.on_host(logits, np.array(random))
            counts[token] += 1
        expected = Sorted(logits, **how).probabilities  # type: ignore[arg-type]
        assert all(expected[token] > 0 for token in counts), how
        assert p_value(counts, expected) > 0.01 / len(GRID), how
