"""Runs all checks, and the measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from .. import device
from .golden import check_logits
from .limits import check_given_back, check_wired_limit
from .operations import check_operations, check_own_kernels
from .report import Verification, describe_machine
from .results import FAIL, Check, CheckResult, attempt, without_paths
from .sampling import check_sampling
from .speed import measure_speed
from .texts import check_texts

CHECKS: dict[str, Check] = {
    "own kernels": check_own_kernels,
    "operations": check_operations,
    "golden cases": check_logits,
    "texts": check_texts,
    "sampling": check_sampling,
    "wired memory limit": check_wired_limit,
}


def verify(
    on_result: Callable[[CheckResult], None] = lambda _: None,
    on_bench: Callable[[], None] = lambda: None,
    *,
    bench: bool = True,
) -> Verification:
    """Check on this device that the runtime computes right; with `bench` also measure its speed.

    `on_result` is told each result as it comes, `on_bench` when the measurement begins. What a
    check raises is its failure.
    """
    device.select()
    start, results, rows = time.perf_counter(), list[CheckResult](), list[dict[str, Any]]()
    for result in run_checks():
        results.append(result)
        on_result(result)
    if bench:
        on_bench()
        try:
            rows = measure_speed()
        except Exception as error:  # such as too little memory; the checks are to be shown
            failure = CheckResult(
                name="speed", outcome=FAIL, expected="a measurement", got=without_paths(error)
            )
            results.append(failure)
            on_result(failure)
    seconds = time.perf_counter() - start
    return Verification(machine=describe_machine(), checks=results, bench=rows, seconds=seconds)


def run_checks() -> Iterator[CheckResult]:
    """Yield the result of each check, in the order of the report."""
    before = mx.get_active_memory()
    for name, check in CHECKS.items():
        yield from attempt(name, check)
    yield from attempt("memory given back", lambda: check_given_back(before))
