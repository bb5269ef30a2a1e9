"""Wraps text to a width; Chinese breaks between any two characters, where rich has spaces alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.measure import Measurement
    from rich.text import Text

_UNIT = re.compile(
    r"\s+|[（《「“]*(?:[^\s\u2e80-\uffef]+|[\u2e80-\uffef]|$)[，。；：、）！？》」”]*"
)
"""What stays on one line: a space, a word, or a wide character; with the marks beside it."""


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells; a longer word is cut."""
    from rich.cells import cell_len, chop_cells

    lines = [""]
    for unit in _UNIT.findall(text):
        if cell_len(lines[-1] + unit.rstrip()) <= width:
            lines[-1] += unit
            continue
        first, *rest = chop_cells(unit.strip(), width) or [""]
        lines += [first, *rest]
    return [line.strip() for line in lines if line.strip()] or [""]


def wrapped(text: str, width: int) -> str:
    """Text whose lines of more than `width` cells are wrapped."""
    from rich.cells import cell_len

    return "\n".join(
        row
        for line in text.split("\n")
        for row in (wrap(line, width) if cell_len(line) > width else [line])
    )


@dataclass(frozen=True)
class Wrapped:
    """A cell of a rich table, wrapped to the column."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        yield Text("\n".join(wrap(self.text, options.max_width)))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.cells import cell_len
        from rich.measure import Measurement

        widest = max((cell_len(unit) for unit in _UNIT.findall(self.text)), default=0)
        return Measurement(widest, cell_len(self.text))
