"""Every colour of the command line, by what it means."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {
    "title": "bold",
    "quiet": "dim",
    "good": "green",
    "warning": "yellow",
    "error": "bold red",
    "code": "cyan",
    "link": "underline",
}


@cache
def console(*, stderr: bool = False) -> Console:
    """A console for results (stdout), or for progress and errors (stderr)."""
    from rich.console import Console
    from rich.theme import Theme

    made = Console(theme=Theme(STYLES), stderr=stderr, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = 1000  # in a pipe a row stays on one line
    return made
