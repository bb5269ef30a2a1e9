"""Results of checks: passed, failed, or not made on this device."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

PASS, FAIL, SKIP = "pass", "fail", "not checked"


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One row of the report."""

    name: str
    """The property that holds, such as "cached = uncached"."""
    format: str = ""
    """Number format, where that matters."""
    outcome: str
    """PASS, FAIL or SKIP."""
    expected: str = ""
    got: str = ""

    @property
    def title(self) -> str:
        return f"{self.name}, {self.format}" if self.format else self.name

    def record(self) -> dict[str, str]:
        return asdict(self)


class Errors:
    """The errors of one check, by what was checked, against one limit."""

    def __init__(self, name: str, format: str, limit: float):
        self.name, self.format, self.limit = name, format, limit
        self.errors: dict[str, float] = {}

    def add(self, subject: str, error: float) -> None:
        """Keep the largest error of a subject; NaN counts as infinite."""
        error = math.inf if math.isnan(error) else error
        self.errors[subject] = max(error, self.errors.get(subject, 0.0))

    def result(self) -> CheckResult:
        wrong = {s: e for s, e in self.errors.items() if e > self.limit}
        worst = max(self.errors, key=self.errors.__getitem__)
        shown = wrong or {worst: self.errors[worst]}
        texts = [f"{error:.2g} ({subject})" for subject, error in shown.items()]
        return CheckResult(
            name=self.name,
            format=self.format,
            outcome=FAIL if wrong else PASS,
            expected=f"error at most {self.limit:.2g}",
            got=", ".join(texts) if self.errors[worst] else "no difference",
        )


def relative_error(found: mx.array | Array, expected: mx.array | Array) -> float:
    """Largest difference in units of the expected numbers' deviation; NaN where one is."""
    a, b = as_numpy(found), as_numpy(expected)
    return float(np.abs(a - b).max() / max(b.std(), 1e-30))


def as_numpy(array: mx.array | Array) -> Array:
    if isinstance(array, mx.array):
        array = np.array(array.astype(mx.float32))
    return array.astype(np.float64)


Check = Callable[[], Iterator[CheckResult]]


def attempt(name: str, check: Check) -> Iterator[CheckResult]:
    """Yield the check's results; what it raises is a failure of `name`."""
    try:
        yield from check()
    except Exception as error:  # whatever it is, the report must name it
        yield CheckResult(name=name, outcome=FAIL, expected="no error", got=without_paths(error))


def without_paths(error: Exception) -> str:
    """The error's type and first line, without paths, which may hold a person's name."""
    first = (str(error).strip().splitlines() or [""])[0]
    text = re.sub(r"(?:~|\w:)?[/\\][^\s:'\"]+", "…", first)
    return f"{type(error).__name__}: {text}"[:200]
