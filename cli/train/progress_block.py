"""How far a training run is, in a few lines that fit the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import timedelta

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from minicpm_mlx.train.memory import unit_of
from minicpm_mlx.train.tracking.curve import sparkline
from minicpm_mlx.train.tracking.events import (
    Event,
    Noted,
    Saved,
    Started,
    Trained,
    Validated,
)

from ..render.markdown import UNSAFE
from ..render.texts import Texts

LABELS = {
    "step": ("step {step}/{steps}", "步 {step}/{steps}"),
    "left": ("{time} left", "剩余 {time}"),
    "loss": ("loss {loss:#.4g}", "损失 {loss:#.4g}"),
    "valid": ("valid loss {loss:#.4g}", "验证损失 {loss:#.4g}"),
    "best": (" (best)", "（最佳）"),
    "behind": (" (best {best:#.4g})", "（最佳 {best:#.4g}）"),
    "rate": ("lr {rate:.1e}", "学习率 {rate:.1e}"),
    "speed": ("{speed:.0f} tok/s", "{speed:.0f} 词元/秒"),
    "memory": ("{size:.1f} {unit}", "{size:.1f} {unit}"),
    "epoch": ("epoch {epoch:.2f}", "轮次 {epoch:.2f}"),
    "saved": ("saved {folder}", "已保存 {folder}"),
    "prompt": ("prompt", "提示"),
    "before": ("before", "训练前"),
    "after": ("after", "训练后"),
}
"""What is said of a run, in English and in Chinese."""

LONGEST = 60  # columns of a bar or of a line of blocks
SHORTEST = 6  # below which they are left out
MARGIN = 3  # columns kept free, for the ^C that terminals show


class ProgressBlock:
    """What is known of a run, drawn as wide as the terminal is then.

    Pieces that find no room are left out, the least important first: no line is ever folded.
    """

    def __init__(self, words: Texts) -> None:
        self._words = words
        self._started: Started | None = None
        self._trained: Trained | None = None
        self._validated: Validated | None = None
        self._best: float | None = None
        self._losses: list[float] = []
        self._begun = self._latest = time.monotonic()
        self._pace: float | None = None  # seconds a step, over the last few events
        self._widths: list[int] = []

    def take(self, event: Event) -> None:
        """Notes what an event says."""
        if isinstance(event, Started):
            self._started = event
            self._begun = self._latest = time.monotonic()
        elif isinstance(event, Trained):
            self._measure(event)
            self._trained = event
            self._losses.append(event.loss)
        elif isinstance(event, Validated):
            self._validated = event
            self._best = event.loss if event.best else self._best

    def line(self, event: Event) -> str:
        """The one line that tells of an event: "step 20/100  loss 1.832"."""
        if isinstance(event, Trained):
            told = [self._say("loss", loss=event.loss), *self._facts(event)]
        elif isinstance(event, Validated):
            told = [self._valid(event), *_extra(event.extra)]
        elif isinstance(event, Saved):
            told = [self._say("saved", folder=event.folder)]
        else:
            told = [event.text] if isinstance(event, Noted) else []
        return " ".join(clean("  ".join([self._step(event.step), *told])).split("\n"))

    def rows(self, width: int) -> int:
        """How many rows what was drawn last takes up in a terminal that is now so wide."""
        return sum(max(1, -(-drawn // max(1, width))) for drawn in self._widths)

    @property
    def drawn(self) -> int:
        """How many lines were drawn last."""
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
        found = []
        if self._trained or self._validated:
            loss = [self._say("loss", loss=self._trained.loss)] if self._trained else []
            text = self._with_valid(loss, room)
            free = min(LONGEST, room - cell_len(text) - 2)
            curve = free >= SHORTEST and not ascii_only
            found.append(Text(text))
            if curve and len(self._losses) > 1:
                found[0].append("  ").append(sparkline(self._losses, free), "code")
        if self._trained:
            found.append(Text(fit(self._facts(self._trained), room), "quiet"))
        return found

    def _with_valid(self, loss: list[str], room: int) -> str:
        if self._validated is None:
            return fit(loss, room)
        whole = "  ".join([*loss, self._valid(self._validated)])
        short = self._say("valid", loss=self._validated.loss)
        return whole if cell_len(whole) <= room else fit([*loss, short], room)

    def _measure(self, event: Trained) -> None:
        now, before = time.monotonic(), self._trained or self._started
        if before is not None and event.step > before.step:
            pace = (now - self._latest) / (event.step - before.step)
            # What a validation or a checkpoint cost is spread over the events around it.
            self._pace = pace if self._pace is None else 0.8 * self._pace + 0.2 * pace
        self._latest = now

    def _times(self, step: int, steps: int) -> list[str]:
        now = time.monotonic()
        times = [_clock(now - self._begun)]
        if self._pace is not None and step < steps:
            left = self._pace * (steps - step) - (now - self._latest)
            times.insert(0, self._say("left", time=_clock(left)))
        return times

    def _facts(self, event: Trained) -> list[str]:
        unit, count = unit_of(event.peak_memory)
        return [
            self._say("rate", rate=event.learning_rate),
            self._say("speed", speed=event.tokens_per_second),
            self._say("memory", size=event.peak_memory / count, unit=unit),
            self._say("epoch", epoch=event.epoch),
            *_extra(event.extra),
        ]

    def _valid(self, event: Validated) -> str:
        told = self._say("valid", loss=event.loss)
        if event.best:
            return told + self._say("best")
        return told + (self._say("behind", best=self._best) if self._best is not None else "")

    def _step(self, step: int) -> str:
        return self._say("step", step=step, steps=self._started.steps if self._started else "?")

    def _say(self, key: str, **values: object) -> str:
        return self._words.pick(*LABELS[key]).format(**values)


def fit(pieces: Iterable[str], room: int) -> str:
    """Those of the pieces that fit on one line of `room` columns, the first ones first."""
    line = ""
    for piece in pieces:
        longer = f"{line}  {piece}" if line else piece
        line = longer if cell_len(longer) <= room else line
    return line


def clean(text: str) -> str:
    """Text without what could move the cursor."""
    return UNSAFE.sub("", text)


def _extra(numbers: dict[str, float]) -> list[str]:
    return [f"{name} {value:#.3g}" for name, value in numbers.items()]


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=max(0, int(seconds))))
