"""The report of a verification, as a record and as Markdown for an issue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..bench.machine import power, thermal
from ..bench.output import result
from ..doctor import examine
from ..files.tables import markdown_table
from .formats import rounds_float32
from .results import FAIL, SKIP, CheckResult

FACTS = ("chip", "device", "blas", "command_buffers", "dtype", "memory_bytes", "system")
VERSIONS = ("minicpm-mlx", "mlx", "mlx-lm", "python")
"""Of `examine`; its folders stay out, since their names may hold a person's."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Results of all checks, on which machine they were made, and its speed."""

    machine: dict[str, Any]
    checks: Sequence[CheckResult]
    bench: Sequence[dict[str, Any]] = ()
    """Rows as of `bench --json`, with `expected_ts` and `bandwidth_measured`."""
    seconds: float = 0.0

    @property
    def failed(self) -> list[str]:
        """Titles of the checks that failed."""
        return [check.title for check in self.checks if check.outcome == FAIL]

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def summary(self) -> str:
        """The result in a line."""
        if self.failed:
            return f"{len(self.failed)} of {len(self.checks)} failed: {'; '.join(self.failed)}"
        skipped = sum(1 for check in self.checks if check.outcome == SKIP)
        return f"{len(self.checks) - skipped} checks passed, {skipped} do not apply here"

    def record(self) -> dict[str, Any]:
        """The report as JSON."""
        return {
            "passed": self.passed,
            "failed": self.failed,
            "machine": self.machine,
            "checks": [check.record() for check in self.checks],
            "bench": list(self.bench),
            "elapsed_s": round(self.seconds, 1),
        }

    def markdown(self) -> str:
        """A block to paste into an issue: no paths, no names."""
        facts = ", ".join(
            f"{name.removesuffix('_bytes')} {_shown(name, value)}"
            for name, value in self.machine.items()
            if value is not None
        )
        cells = ((c.title, c.outcome, c.expected, c.got) for c in self.checks)
        rows = [[text.replace("|", "\\|") for text in row] for row in cells]
        columns = ("check", "result", "expected", "got")
        parts = [
            f"**minicpm-mlx doctor --verify: {self.summary}**",
            facts,
            markdown_table(columns, rows, text_columns=len(columns)),
        ]
        if self.bench:
            parts.append(self.speed())
        return "\n\n".join(parts)

    def speed(self) -> str:
        """The measured speed, as a Markdown table."""
        rows = [
            (
                str(row["model"]),
                str(row["test"]),
                result(row),
                "" if row["expected_ts"] is None else f"{row['expected_ts']:.0f}",
                _roofline(row),
            )
            for row in self.bench
        ]
        columns = ("model", "test", "tokens/s", "expected", "roofline")
        return markdown_table(columns, rows, text_columns=2)


def describe_machine() -> dict[str, Any]:
    """Chip, memory, versions, power supply and heat of this machine."""
    facts = examine()
    names = (*FACTS, *VERSIONS)
    return {name.replace("-", "_"): facts[name] for name in names} | {
        "power": power(),
        "thermal": thermal(),
        "float32_products": "rounded to 10 bits" if rounds_float32() else "exact",
    }


def _shown(name: str, value: Any) -> str:
    return f"{value / 1e9:.1f} GB" if name == "memory_bytes" else str(value)


def _roofline(row: dict[str, Any]) -> str:
    if row["roofline"] is None:
        return ""
    measured = " of the measured bandwidth" if row["bandwidth_measured"] else ""
    return f"{100 * row['roofline']:.0f} %{measured}"
