"""Prints and saves the measurements of the scripts here."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

from minicpm_mlx import device  # here: it finds a BLAS before any script imports MLX


def options(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options of all scripts: number of rounds, file of the record."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=Path)
    return parser


class Report:
    """Prints medians with their spread as they come; `save` writes them to a file."""

    def __init__(self, **facts: object) -> None:
        machine = f"{device.chip()}, {platform.system()}, BLAS {device.blas}"
        self.record: dict[str, object] = {"machine": machine, **facts}
        print(machine, *(f"{name} {fact}" for name, fact in facts.items()), sep="; ")

    def add(self, name: str, values: Sequence[float], unit: str = "s") -> float:
        """Prints and records minimum, median and maximum; returns the median."""
        least, median, most = min(values), statistics.median(values), max(values)
        self.record[f"{name} {unit}".strip()] = [float(f"{v:.4g}") for v in (least, median, most)]
        print(f"{name:36} {median:10.4g} {unit:6} ({least:.4g} to {most:.4g})", flush=True)
        return median

    def save(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.record, indent=2) + "\n", encoding="utf-8")
