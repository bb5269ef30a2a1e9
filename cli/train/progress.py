"""Shows a training run as a moving block, as lines or as JSON.

It loads rich: import it in the function that needs it.
"""

from __future__ import annotations

import sys
from contextlib import suppress

from rich.console import Console, ConsoleRenderable
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from minicpm_mlx.train.tracking.events import Event, Noted, Sampled, Saved, Started
from minicpm_mlx.train.tracking.jsonl_log import to_line

from ..render.texts import Texts
from ..render.theme import console
from .progress_block import ProgressBlock, clean

SIDE_BY_SIDE = 100  # columns from which two replies are printed side by side
REFRESH = 2.0  # updates of the clock in a second


class JsonLines:
    """A listener that prints each event as a line of JSON to standard output, as `JsonLog` does."""

    def __call__(self, event: Event) -> None:
        print(to_line(event), flush=True)


class Screen:
    """A listener that shows the run on standard error, and a context that restores the terminal.

    A terminal shows a moving block, with checkpoints and notes above it; elsewhere each event is
    a line in English, whatever the locale. The end compares replies before and after the training.
    """

    def __init__(self) -> None:
        self._console = console(stderr=True)
        self._live_display = self._console.is_interactive and self._console.file.isatty()
        self._texts = Texts(None if self._live_display else "en")
        self._block = ProgressBlock(self._texts)
        self._live: Live | None = None
        self._replies: dict[str, list[str]] = {}

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # the terminal has gone
            if self._live is not None:
                self._live.stop()
            self._compare()

    def __call__(self, event: Event) -> None:
        self._block.take(event)
        if isinstance(event, Started):
            self._show()
        elif isinstance(event, Sampled):
            self._replies.setdefault(event.prompt, []).append(event.reply)
        elif isinstance(event, Saved | Noted) or not self._live_display:
            self._print(event)
        if self._live is not None:
            self._live.refresh()

    def _show(self) -> None:
        if self._live_display and self._live is None:
            self._live = ResizableLive(self._block, self._console)
            self._live.start(refresh=True)
            # If the process is killed, a hidden cursor would stay hidden.
            self._console.show_cursor(True)

    def _print(self, event: Event) -> None:
        style = "warning" if isinstance(event, Noted) else ""
        self._console.print(self._block.line(event), style=style, soft_wrap=True)

    def _compare(self) -> None:
        for prompt, replies in self._replies.items():
            if len(replies) > 1:
                before, after = clean(replies[0].strip()), clean(replies[-1].strip())
                self._console.print(self._compared(clean(prompt.strip()), before, after))

    def _compared(self, prompt: str, before: str, after: str) -> Table | Text:
        rows = {
            self._texts("train.prompt"): prompt,
            self._texts("train.before"): before,
            self._texts("train.after"): after,
        }
        if self._live_display and self._console.width >= SIDE_BY_SIDE:
            wide = Table(title=Text(prompt, "title"), expand=True, header_style="quiet")
            for label in list(rows)[1:]:
                wide.add_column(label, ratio=1, overflow="fold")
            wide.add_row(Text(before), Text(after))
            return wide
        if not self._live_display:  # a table would be padded with spaces
            return Text("\n".join(f"{label}: {text}" for label, text in rows.items()))
        narrow = Table.grid(padding=(0, 2))
        narrow.add_column(style="quiet", no_wrap=True)
        narrow.add_column(overflow="fold")
        for label, text in rows.items():
            narrow.add_row(label, Text(text, "title" if text == prompt else ""))
        return narrow


class ResizableLive(Live):
    """Rich's live display, which also erases lines that a narrowed terminal has folded.

    On a terminal that cuts lines off instead (xterm), it erases as many lines above.
    """

    def __init__(self, block: ProgressBlock, stderr: Console) -> None:
        super().__init__(
            block,
            console=stderr,
            refresh_per_second=REFRESH,
            redirect_stdout=sys.stdout.isatty(),  # else it would go to standard error
            redirect_stderr=True,
        )
        self._block = block

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        folded = self._block.rows(self.console.width) - self._block.drawn
        erase = (ControlType.ERASE_IN_LINE, 2)
        up = Control(erase, *((ControlType.CURSOR_UP, 1), erase) * folded)
        return [*([up] if folded > 0 else []), *super().process_renderables(renderables)]
