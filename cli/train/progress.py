"""What a command shows of a training run: a block that moves, lines, or JSON.

It loads rich: import it in the function that needs it.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from types import TracebackType

from rich.console import Console, ConsoleRenderable
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from minicpm_mlx.train.tracking.events import (
    Event,
    Noted,
    Sampled,
    Saved,
    Started,
)
from minicpm_mlx.train.tracking.jsonl_log import to_line

from ..render.texts import Texts
from ..render.theme import console
from .progress_block import LABELS, ProgressBlock, clean

SIDE_BY_SIDE = 100  # columns from which two replies stand beside each other
REFRESH = 2.0  # times a second that the clock moves on


class JsonLines:
    """A listener that prints each event as a line of JSON to standard output, as `JsonLog` does."""

    def __call__(self, event: Event) -> None:
        print(to_line(event), flush=True)


class Screen:
    """A listener that shows the run on standard error; a context, so that it leaves it in order.

    At a terminal a block at the bottom moves, with checkpoints and notes above it; elsewhere each
    event is a line, in English whatever the locale. Replies from before and after the training are
    shown at the end.
    """

    def __init__(self) -> None:
        self._console = console(stderr=True)
        self._moves = self._console.is_interactive and self._console.file.isatty()
        self._words = Texts(None if self._moves else "en")
        self._block = ProgressBlock(self._words)
        self._live: Live | None = None
        self._replies: dict[str, list[str]] = {}

    def __enter__(self) -> Screen:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        elif isinstance(event, Saved | Noted) or not self._moves:
            self._print(event)
        if self._live is not None:
            self._live.refresh()

    def _show(self) -> None:
        if self._moves and self._live is None:
            self._live = Steady(self._block, self._console)
            self._live.start(refresh=True)
            # Hidden, it would stay so where the process is killed.
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
        said = {key: self._words.pick(*LABELS[key]) for key in ("prompt", "before", "after")}
        if self._moves and self._console.width >= SIDE_BY_SIDE:
            beside = Table(title=Text(prompt, "title"), expand=True, header_style="quiet")
            beside.add_column(said["before"], ratio=1, overflow="fold")
            beside.add_column(said["after"], ratio=1, overflow="fold")
            beside.add_row(Text(before), Text(after))
            return beside
        if not self._moves:  # a table would be filled up with spaces
            return Text(
                f"{said['prompt']}: {prompt}\n{said['before']}: {before}\n{said['after']}: {after}"
            )
        below = Table.grid(padding=(0, 2))
        below.add_column(style="quiet", no_wrap=True)
        below.add_column(overflow="fold")
        for name, text in (("prompt", prompt), ("before", before), ("after", after)):
            below.add_row(said[name], Text(text, "title" if name == "prompt" else ""))
        return below


class Steady(Live):
    """Rich's display, which also finds its place again after the terminal was made narrower.

    A terminal then folds the lines that no longer fit. One that cuts them off instead (xterm) loses
    as many lines above.
    """

    def __init__(self, block: ProgressBlock, to: Console) -> None:
        super().__init__(
            block,
            console=to,
            refresh_per_second=REFRESH,
            redirect_stdout=sys.stdout.isatty(),  # else it would be sent to standard error
            redirect_stderr=True,
        )
        self._block = block

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        folded = self._block.rows(self.console.width) - self._block.drawn
        erase = (ControlType.ERASE_IN_LINE, 2)
        up = Control(erase, *((ControlType.CURSOR_UP, 1), erase) * folded)
        return [*([up] if folded > 0 else []), *super().process_renderables(renderables)]
