"""The progress of a training run, in a few lines that fit the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from minicpm_mlx.train.memory import unit_of
from minicpm_mlx.train.tracking.curve import sparkline
from minicpm_mlx.train.tracking.events import Event, Noted, Saved, Started, Trained, Validated

from ..render.markdown import UNSAFE
from ..render.texts import Texts

LONGEST = 60  # columns of the bar and of the curve
SHORTEST = 6  # columns below which they are left out
MARGIN = 3  # columns kept free for the ^C that terminals echo


class ProgressBlock:
    """The state of a run, drawn to the width of the terminal.

    Pieces that do not fit are left out, the least important first, so that no line folds.
    """

    def __init__(self, texts: Texts) -> None:
        self._texts = texts
        self._started: Started | None = None
        self._trained: Trained | None = None
        self._validated: Validated | None = None
        self._best: float | None = None
        self._losses: list[float] = []
        self._started_at = self._updated_at = time.monotonic()
        self._pace: float | None = None  # seconds a step, over the last few events
        self._widths: list[int] = []

    def take(self, event: Event) -> None:
        """Updates the state from an event."""
        if isinstance(event, Started):
            self._started = event
            self._started_at = self._updated_at = time.monotonic()
        elif isinstance(event, Trained):
            self._measure(event)
            self._trained = event
            self._losses.append(event.loss)
        elif isinstance(event, Validated):
            self._validated = event
            self._best = event.loss if event.best else self._best

    def line(self, event: Event) -> str:
        """One line for an event: "step 20/100  loss 1.832"."""
        if isinstance(event, Trained):
            pieces = [self._texts("train.loss", loss=event.loss), *self._facts(event)]
        elif isinstance(event, Validated):
            pieces = [self._valid(event), *_extra(event.extra)]
        elif isinstance(event, Saved):
            pieces = [self._texts("train.saved", folder=event.folder)]
        else:
            pieces = [event.text] if isinstance(event, Noted) else []
        return " ".join(clean("  ".join([self._step(event.step), *pieces])).split("\n"))

    def rows(self, width: int) -> int:
        """Rows that the last drawing takes in a terminal of this width."""
        return sum(max(1, -(-columns // max(1, width))) for columns in self._widths)

    @property
    def drawn(self) -> int:
        """Lines of the last drawing."""
        return len(self._widths)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = max(1, options.max_width - MARGIN)
        lines = [line for line in self._lines(room, options.ascii_only) if line.plain]
        for line in lines:
            line.truncate(room)
        self._widths = [line.cell_len for line in lines]
        yield from lines

    def _lines(self, room: int, ascii_only: bool) -> list[Text]:
        step = self._trained.step if self._trained else self._started.step if self._started else 0
        return [self._progress(step, room, ascii_only), *self._measured(room, ascii_only)]

    def _progress(self, step: int, room: int, ascii_only: bool) -> Text:
        steps = max(1, self._started.steps if self._started else step)
        share = min(1.0, step / steps)
        head = fit([self._step(step)], room)
        times = [f"{int(share * 100)}%", *self._times(step, steps)]
        tail = fit(times, room - cell_len(head) - 2)
        free = min(LONGEST, room - cell_len(head) - cell_len(tail) - 4)
        line = Text.assemble((head, "title"))
        if free >= SHORTEST:
            full, bar = int(share * free), "-" if ascii_only else "━"
            line.append("  ").append(bar * full, "good")
            line.append((" " if ascii_only else bar) * (free - full), "quiet")
        return line.append(f"  {tail}" if tail else "")

    def _measured(self, room: int, ascii_only: bool) -> list[Text]:
        lines = []
        if self._trained or self._validated:
            loss = [self._texts("train.loss", loss=self._trained.loss)] if self._trained else []
            text = self._with_valid(loss, room)
            free = min(LONGEST, room - cell_len(text) - 2)
            curve = free >= SHORTEST and not ascii_only
            lines.append(Text(text))
            if curve and len(self._losses) > 1:
                lines[0].append("  ").append(sparkline(self._losses, free), "code")
        if self._trained:
            lines.append(Text(fit(self._facts(self._trained), room), "quiet"))
        return lines

    def _with_valid(self, loss: list[str], room: int) -> str:
        if self._validated is None:
            return fit(loss, room)
        whole = "  ".join([*loss, self._valid(self._validated)])
        short = self._texts("train.valid", loss=self._validated.loss)
        return whole if cell_len(whole) <= room else fit([*loss, short], room)

    def _measure(self, event: Trained) -> None:
        now, before = time.monotonic(), self._trained or self._started
        if before is not None and event.step > before.step:
            pace = (now - self._updated_at) / (event.step - before.step)
            # The mean spreads the time of a validation or checkpoint over the events around it.
            self._pace = pace if self._pace is None else 0.8 * self._pace + 0.2 * pace
        self._updated_at = now

    def _times(self, step: int, steps: int) -> list[str]:
        now = time.monotonic()
        times = [_clock(now - self._started_at)]
        if self._pace is not None and step < steps:
            left = self._pace * (steps - step) - (now - self._updated_at)
            times.insert(0, self._texts("train.left", time=_clock(left)))
        return times

    def _facts(self, event: Trained) -> list[str]:
        unit, count = unit_of(event.peak_memory)
        return [
            self._texts("train.rate", rate=event.learning_rate),
            self._texts("train.speed", speed=event.tokens_per_second),
            self._texts("memory", size=event.peak_memory / count, unit=unit),
            self._texts("train.epoch", epoch=event.epoch),
            *_extra(event.extra),
        ]

    def _valid(self, event: Validated) -> str:
        loss = self._texts("train.valid", loss=event.loss)
        if event.best:
            return loss + self._texts("train.is_best")
        return loss + ("" if self._best is None else self._texts("train.not_best", best=self._best))

    def _step(self, step: int) -> str:
        steps = self._started.steps if self._started else "?"
        return self._texts("train.step", step=step, steps=steps)


def fit(pieces: Iterable[str], room: int) -> str:
    """Joins the pieces that fit on one line of `room` columns, in their order."""
    line = ""
    for piece in pieces:
        longer = f"{line}  {piece}" if line else piece
        line = longer if cell_len(longer) <= room else line
    return line


def clean(text: str) -> str:
    """Removes control characters, which could move the cursor."""
    return UNSAFE.sub("", text)


def _extra(numbers: dict[str, float]) -> list[str]:
    return [f"{name} {value:#.3g}" for name, value in numbers.items()]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=max(0, int(seconds))))
