"""Sampling on this device against the host, and the whole numbers that it depends on."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from ..engine.draw import UNDECIDED, Draw
from .results import FAIL, PASS, Array, CheckResult

VOCABULARY = 122_753
"""Tokens of MiniCPM-2B."""
DRAWS = 24
"""Draws from one set of logits, on the device and on the host."""
SETTINGS: tuple[dict[str, float], ...] = (
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 0.8, "top_k": 50},
    {"temperature": 1.0, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 0.1},
)

CHECKS = ("sums of 64-bit integers", "sampling on the device = on the host")


def check_sampling() -> Iterator[CheckResult]:
    """Check that the device and the host draw only tokens that the settings keep, and that the
    sums which decide about them are exact."""
    yield _check_sums()
    wrong, undecided, drawn = [], 0, 0
    for number, settings in enumerate(SETTINGS):
        logits = _logits(number)
        kept = _kept(logits, **settings)
        draw, key = Draw(VOCABULARY, **settings), mx.random.key(number)  # type: ignore[arg-type]
        shown, array = " ".join(f"{k} {v:g}" for k, v in settings.items()), mx.array(logits)
        for _ in range(DRAWS):
            key, random = draw.split(key)
            device_token = int(draw.on_device(array, random).item())  # type: ignore[arg-type]
            tokens = {"device": device_token, "host": draw.on_host(logits, np.array(random))}
            undecided, drawn = undecided + (device_token == UNDECIDED), drawn + 1
            wrong += [
                f"{place} drew {token}, which is not kept ({shown})"
                for place, token in tokens.items()
                if token != UNDECIDED and not kept[token]
            ]
    # Each try fails with less than 1 in 500, so most draws are decided on the device.
    if undecided > drawn // 4:
        wrong.append(f"{undecided} of {drawn} draws undecided on the device")
    yield CheckResult(
        name=CHECKS[1],
        outcome=FAIL if wrong else PASS,
        expected=f"tokens that a sort in float64 keeps, {drawn} draws on each",
        got="; ".join(wrong[:3]) if wrong else "the same tokens kept",
    )


def _logits(seed: int) -> Array:
    """A few likely tokens, ties, and a long tail."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=VOCABULARY) * 1.5
    logits[rng.integers(VOCABULARY, size=40)] += 9
    return np.round(logits, 2).astype(np.float32)


def _kept(
    logits: Array, temperature: float, top_p: float = 1, top_k: float = 0, min_p: float = 0
) -> Array:
    """(V,) whether a token may be drawn, by a sort in float64; a little more at each limit."""
    order = np.argsort(-logits, kind="stable")
    ranked = logits[order].astype(np.float64)
    p = np.exp((ranked - ranked[0]) / temperature)
    if top_k:
        p[int(top_k) :] = 0
    p /= p.sum()
    before = np.cumsum(p) - p
    kept = np.zeros(len(p), bool)
    kept[order] = (p > 0) & (before < top_p + 1e-5) & (p >= min_p * p[0] * (1 - 1e-5))
    return kept


def _check_sums() -> CheckResult:
    """Sums of 64-bit integers in any order, near the largest that a draw makes."""
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 2**44, size=VOCABULARY)
    array = mx.array(weights)
    sums = np.array(mx.cumsum(array))
    exact = np.cumsum(weights)
    same = array.dtype == mx.int64 and bool((sums == exact).all())
    same = same and int(array.sum().item()) == int(exact[-1])  # type: ignore[arg-type]
    ids = mx.arange(VOCABULARY)
    found = int((mx.array(exact) <= mx.array(exact[VOCABULARY // 2])).sum().item())  # type: ignore[arg-type]
    smallest = int((((ids.astype(mx.int64) + 5) << 32) + ids).min().item())  # type: ignore[arg-type]
    same = same and found == VOCABULARY // 2 + 1 and smallest == 5 << 32
    return CheckResult(
        name=CHECKS[0],
        outcome=PASS if same else FAIL,
        expected="exact",
        got="exact" if same else f"{int(sums[-1])} in place of {int(exact[-1])}",
    )
