"""A model's thought at the terminal: dimmed, behind a bar, and gone once the answer begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .wrap import wrap

if TYPE_CHECKING:
    from rich.console import Console

BAR = "│ "
"""Tells a thought from an answer where the terminal cannot dim."""
ROWS = 10  # of a thought that will be removed, at most: what has scrolled away cannot be
LONG = 1000  # characters of a line, beyond which its first rows are not wrapped anew


class ThoughtStream:
    """Writes a thought while it comes.

    Its last rows are shown until `close` removes them. With `lasting`, and where no cursor can be
    moved, each row is written as it is complete, and stays.
    """

    def __init__(self, console: Console, *, lasting: bool = False) -> None:
        self._console = console
        self._lasting = lasting or not console.is_terminal or console.is_dumb_terminal
        self._rows: list[str] = []  # complete, and not written if they stay
        self._blank = True  # the last row is empty, or none has come
        self._open = ""  # the text after them
        self._shown: list[str] = []

    def feed(self, text: str) -> None:
        """Takes any piece of the thought, cut anywhere."""
        from .markdown import UNSAFE

        *lines, self._open = (self._open + UNSAFE.sub("", text).replace("\t", " ")).split("\n")
        for line in lines:
            self._add(line)
        if len(self._open) > LONG:
            *complete, last = wrap(self._open, self._width)
            self._rows += complete
            self._open = last + " " * self._open[-1].isspace()
        if self._lasting:
            self._write_rows()
        else:
            room = max(min(ROWS, self._console.height - 2), 1)
            self._rows = self._rows[-room:]
            self._show([*self._rows, *self._wrapped(self._open)][-room:])

    def close(self) -> None:
        """Ends the thought; its rows are removed, or those that stay are completed."""
        if self._lasting:
            self._add(self._open)
            self._write_rows()
        else:
            self._erase()
        self._rows, self._open, self._blank, self._shown = [], "", True, []

    @property
    def _width(self) -> int:
        return max(self._console.width - len(BAR) - 1, 4)

    def _wrapped(self, line: str) -> list[str]:
        return wrap(line, self._width) if line.strip() else []

    def _add(self, line: str) -> None:
        """Adds a complete line; of several empty ones the first."""
        rows = self._wrapped(line)
        self._rows += rows or [""] * (not self._blank)
        self._blank = not rows

    def _write_rows(self) -> None:
        for row in self._rows:
            self._write_dim(BAR + row)
            self._write("\n")
        self._rows.clear()

    def _show(self, rows: list[str]) -> None:
        """Replaces the rows on the screen; what only grows is not written again."""
        before, at = self._shown, len(self._shown) - 1
        grows = bool(before) and len(rows) > at and rows[:at] == before[:-1]
        if grows and rows[at].startswith(before[-1]):
            first, *more = rows[at:]
            added = [first[len(before[-1]) :], *(BAR + row for row in more)]
        else:
            self._erase()
            added = [BAR + row for row in rows]
        self._shown = rows
        self._write_dim("\n".join(added))

    def _erase(self) -> None:
        """Removes the rows from the screen; more lines than rows if it became narrower."""
        from rich.cells import cell_len

        width = max(self._console.width, 1)
        lines = sum(-(-cell_len(BAR + row) // width) for row in self._shown)
        if lines:
            self._write("\r" + f"\x1b[{lines - 1}A" * (lines > 1) + "\x1b[J")

    def _write_dim(self, text: str) -> None:
        self._console.print(text, style="quiet", end="", soft_wrap=True)

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()
