"""Markdown tables of results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1
) -> str:
    """A Markdown table; the columns after the first `text_columns` are aligned to the right."""
    rules = ["---"] * text_columns + ["---:"] * (len(columns) - text_columns)
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, rules, *rows))
