"""Speeds measured on Macs, which users sent: benchmarks/macs/*.json."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from ..arguments import shown
from ..errors import InvalidArgumentError
from .chips import bandwidth
from .output import Row, read

TEXTS = ("chip", "test_time", "mlx", "minicpm_mlx", "system", "power", "thermal")
"""Fields that a row must state as text, besides those by which rows are compared."""
NUMBERS = ("n_prompt", "n_gen", "n_depth", "n_parallel", "memory_bytes", "avg_ts", "stddev_ts")

FOLDERS = (
    Path(__file__).with_name("macs"),
    Path(__file__).parents[2] / "benchmarks" / "macs",
)
"""Where the files are: in an installed package, and in a clone."""


def measured_rows(folder: Path | None = None) -> list[Row]:
    """All rows sent so far; InvalidArgumentError for a file that holds anything else."""
    folders = FOLDERS if folder is None else (folder,)
    files = next((found for path in folders if (found := sorted(path.glob("*.json")))), [])
    return [row for file in files for row in read_macs(file)]


def read_macs(file: Path) -> list[Row]:
    """The rows of one file, each complete and of a known chip."""
    rows = read(file)
    for number, row in enumerate(rows, 1):
        missing = [name for name in TEXTS if not isinstance(row.get(name), str)]
        missing += [name for name in NUMBERS if not _is_number(row.get(name))]
        if missing:
            raise InvalidArgumentError(
                f"{file}: row {number} lacks {', '.join(missing)}; expected what "
                "`minicpm-mlx doctor --verify --json` or `minicpm-mlx bench --json` prints"
            )
        if row.get("device") != "gpu" or bandwidth(str(row["chip"])) is None:
            raise InvalidArgumentError(
                f"{file}: row {number} is of {shown(row['chip'])} ({shown(row.get('device'))}); "
                "expected the GPU of a chip that `bench --predict` lists"
            )
    return list(rows)


def measured_decode(rows: Iterable[Row], models: Iterable[str]) -> dict[str, Row]:
    """The latest row of plain decoding of one of `models`, by chip without "Apple"."""
    latest: dict[str, Row] = {}
    names = set(models)
    for row in sorted(rows, key=lambda row: str(row["test_time"])):
        plain = (row["n_prompt"], row["n_depth"], row["n_parallel"]) == (0, 0, 1)
        other = row.get("copy") or row.get("guess") or row["type_kv"] != "full"
        if row["model"] in names and plain and not other and row["n_gen"]:
            latest[str(row["chip"]).removeprefix("Apple ").strip()] = row
    return latest


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]
