"""What `lora` says before, during and after a run."""

from __future__ import annotations

import json
import shlex
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .theme import console

if TYPE_CHECKING:
    from minicpm_mlx.tokenizer import Tokenizer
    from minicpm_mlx.train.data import Data
    from minicpm_mlx.train.events import Event, Listener
    from minicpm_mlx.train.loop import Plan
    from minicpm_mlx.train.memory import Needed
    from minicpm_mlx.train.run import Result

LOG, CURVE = "log.jsonl", "curve.png"
"""In the run's folder."""


def preview(data: Data, tokenizer: Tokenizer, plan: Plan, needed: Needed, as_json: bool) -> None:
    """What --dry-run shows."""
    from minicpm_mlx.train.overview import overview

    from . import preview as shown

    if as_json:
        record = overview(data, tokenizer) | {"plan": asdict(plan), "memory": asdict(needed)}
        print(json.dumps(record, ensure_ascii=False))
        return
    shown.show(data, tokenizer)
    console().print()
    for line in _described(data, plan, needed):
        console().print(line, highlight=False)


def announce(data: Data, plan: Plan, needed: Needed) -> None:
    """What is about to be done."""
    out = console(stderr=True)
    count = len(data.train)
    out.print(f"{data.format}: {count} samples, {len(data.valid)} to validate on", style="title")
    for line in (*data.notes, *_described(data, plan, needed)):
        out.print(line, highlight=False, soft_wrap=True)


def _described(data: Data, plan: Plan, needed: Needed) -> list[str]:
    epochs = plan.steps * plan.samples_a_step / max(1, len(data.train))
    size = f"{plan.batch_size} samples a batch"
    if plan.accumulate > 1:
        size += f", {plan.accumulate} batches a step"
    fits = [] if needed.fits else ["that does not fit"]
    rate = f"learning rate {plan.schedule.peak:g} ({plan.schedule.kind})"
    return [f"{plan.steps} steps, {epochs:.1f} epochs: {size}; {rate}", needed.described, *fits]


def check(report: str | None, replies: int) -> None:
    """MissingPackageError or InvalidArgumentError for what cannot be seen of a run."""
    from minicpm_mlx.errors import InvalidArgumentError
    from minicpm_mlx.train.trackers import tracker

    if replies < 0:
        raise InvalidArgumentError(f"replies must be 0 or more, got {replies}")
    if report is not None:
        tracker(report, "", {}, Path())


def listener(
    stack: ExitStack, folder: Path, report: str | None, as_json: bool, plan: Plan
) -> Listener:
    """Whoever is told of the run: a screen or JSON, a log, a tracker. `stack` ends them."""
    from minicpm_mlx import distributed
    from minicpm_mlx.train.log import JsonLog
    from minicpm_mlx.train.trackers import tracker

    from .training import JsonLines, Screen

    if distributed.rank() != 0:
        return lambda event: None
    folder.mkdir(parents=True, exist_ok=True)
    listeners: list[Listener] = [JsonLog(folder / LOG)]
    if report is not None:
        found = tracker(report, folder.resolve().name, plan.fingerprint, folder / report)
        stack.callback(found.close)
        listeners.append(found)
    screen: Listener = JsonLines() if as_json else stack.enter_context(Screen())

    def tell(event: Event) -> None:
        for each in listeners:
            each(event)
        with suppress(OSError):  # whoever looked at it has gone; the run goes on
            screen(event)

    return tell


def close(model: str, folder: Path, result: Result, as_json: bool) -> None:
    """What came of it, and how to go on."""
    from minicpm_mlx import distributed

    if distributed.rank() != 0:
        return
    drawn = _draw(folder)
    if as_json:
        record: dict[str, Any] = asdict(result) | {"folder": str(result.folder)}
        print(json.dumps({"event": "ended"} | record, ensure_ascii=False))
        return
    out = console()
    if result.best is not None:
        out.print(f"best validation loss {result.best:.4f}, of step {result.best_step}")
    for name, value in (result.test or {}).items():
        out.print(f"test {name} {value:.4f}")
    if drawn:
        out.print(f"loss curve: {drawn}", highlight=False, soft_wrap=True)
    if not result.complete:
        out.print("the same command with --resume goes on", style="warning")
    out.print("to chat with the result:", style="title")
    out.print(f"  {command(model, result)}", highlight=False, soft_wrap=True)


def command(model: str, result: Result) -> str:
    """That starts a chat with the result."""
    folder = str(result.folder)
    words = ["--model", folder] if result.whole else ["--model", model, "--adapter", folder]
    return shlex.join(["minicpm-mlx", "chat", *words])


def _draw(folder: Path) -> Path | None:
    from minicpm_mlx.errors import MiniCPMError
    from minicpm_mlx.train.curve import draw_curve
    from minicpm_mlx.train.log import read_log

    path = folder / CURVE
    with suppress(MiniCPMError):  # no matplotlib, or no step yet
        draw_curve(read_log(folder / LOG), path, folder.resolve().name)
        return path
    return None
