"""Results of checks: passed, failed, or not made on this device."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
        self.problems: dict[str, str] = {}
        """What was raised, by subject."""

    def add(self, subject: str, error: float) -> None:
        """Keep the largest error of a subject; NaN counts as infinite."""
        error = math.inf if math.isnan(error) else error
        self.errors[subject] = max(error, self.errors.get(subject, 0.0))

    def result(self) -> CheckResult:
        wrong = {subject: e for subject, e in self.errors.items() if e > self.limit}
        failed = bool(wrong or self.problems)
        worst = sorted(self.errors.items(), key=lambda item: item[1])[-1:]
        shown = wrong if failed else dict(worst)
        texts = [f"{error:.2g} ({subject})" for subject, error in shown.items()]
        texts += [f"{problem} ({subject})" for subject, problem in self.problems.items()]
        return CheckResult(
            name=self.name,
            format=self.format,
            outcome=FAIL if failed else PASS,
            expected=f"error at most {self.limit:.2g}",
            got=", ".join(texts) if failed or any(shown.values()) else "no difference",
        )


@contextmanager
def catching(subject: str, *checks: Errors) -> Iterator[None]:
    """Make what is raised a failure of `checks`, so that others go on."""
    try:
        yield
    except Exception as error:  # whatever it is, the report must name it
        for check in checks:
            check.problems[subject] = without_paths(error)


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


def without_paths(problem: Exception | str) -> str:
    """An error's type and first line, or a text, without paths, which may hold a person's name."""
    first = (str(problem).strip().splitlines() or [""])[0]
    text = re.sub(r"(?:~|\b[A-Za-z]:)?[/\\][^\s:'\",;)]+", "…", first)
    return text[:200] if isinstance(problem, str) else f"{type(problem).__name__}: {text}"[:200]
