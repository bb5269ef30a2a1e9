"""Memory: the limits that the program sets, and that checks give back what they took."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import mlx.core as mx

from .. import device
from .results import FAIL, PASS, SKIP, CheckResult

SLACK = 16 << 20
"""Bytes that may stay in use: tables that are kept, and kernels."""


def check_wired_limit() -> Iterator[CheckResult]:
    """Check that weights may stay resident up to the size that the system recommends."""
    name = "wired memory limit"
    reason = None
    if device.on_cpu() or not mx.metal.is_available():
        reason = "only a Mac's GPU has one"
    elif int(platform.mac_ver()[0].partition(".")[0] or 0) < 15:
        reason = "needs macOS 15"
    if reason:
        yield CheckResult(name=name, outcome=SKIP, got=reason)
        return
    recommended = int(mx.device_info()["max_recommended_working_set_size"])
    before = mx.set_wired_limit(recommended)  # the only way to read it
    mx.set_wired_limit(before)
    yield CheckResult(
        name=name,
        outcome=PASS if before == recommended else FAIL,
        expected=f"{recommended} bytes, as the system recommends",
        got=f"{before} bytes",
    )


def check_given_back(before: int) -> Iterator[CheckResult]:
    """Check that little more than `before` bytes are in use, once nothing is computed, and that
    the cache of free memory can be emptied."""
    mx.synchronize()
    mx.clear_cache()
    used, cached = max(mx.get_active_memory() - before, 0), mx.get_cache_memory()
    yield CheckResult(
        name="memory given back",
        outcome=PASS if used <= SLACK and cached <= SLACK else FAIL,
        expected=f"at most {SLACK >> 20} MiB kept",
        got=f"{used / 2**20:.1f} MiB in use, {cached / 2**20:.1f} in the cache",
    )
