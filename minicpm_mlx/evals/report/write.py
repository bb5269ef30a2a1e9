"""Writes a report to a folder: JSON, Markdown, CSV, and a chart."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..record import write_json, write_text
from .chart import draw_scores
from .summary import Report
from .tables import as_csv, as_markdown


def write_report(report: Report, folder: Path) -> list[Path]:
    """Writes report.json, .md, .csv and, with matplotlib, .png; returns their paths."""
    write_json(folder / "report.json", report.to_json())
    write_text(folder / "report.md", as_markdown(report))
    write_text(folder / "report.csv", as_csv(report))
    names = ["report.json", "report.md", "report.csv"]
    if find_spec("matplotlib") is not None and report.tasks:
        draw_scores(report, folder / "report.png")
        names.append("report.png")
    return [folder / name for name in names]
