"""What `lora` says before, during and after a run."""

from __future__ import annotations

import json
import shlex
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..render.texts import Texts
from ..render.theme import console

if TYPE_CHECKING:
    from minicpm_mlx.text.tokenizer import Tokenizer
    from minicpm_mlx.train.data.dataset import Data
    from minicpm_mlx.train.finetune import TrainingResult
    from minicpm_mlx.train.memory import TrainingMemory
    from minicpm_mlx.train.planning import TrainingPlan
    from minicpm_mlx.train.tracking.events import Event, Listener

LOG, CURVE = "log.jsonl", "curve.png"
"""In the run's folder."""

SAID = {
    "best": (
        "best validation loss {loss:.4f}, of step {step}",
        "最佳验证损失 {loss:.4f}（第 {step} 步）",
    ),
    "no_better": (
        "no validation loss was below that before training, {loss:.4f}: the last step is kept",
        "验证损失始终不低于训练前的 {loss:.4f}，保留最后一步",
    ),
    "test": ("test {name} {value:.4f}", "测试集 {name} {value:.4f}"),
    "curve": ("loss curve: {path}", "损失曲线：{path}"),
    "resume": ("the same command with --resume goes on", "加上 --resume 再次运行同一命令即可继续"),
    "chat": ("to chat with the result:", "与训练结果对话："),
}
"""What is said after a run, in English and in Chinese."""


def preview(
    data: Data, tokenizer: Tokenizer, plan: TrainingPlan, needed: TrainingMemory, as_json: bool
) -> None:
    """What --dry-run shows."""
    from minicpm_mlx.train.data.preview import overview

    from . import data_preview as shown

    if as_json:
        record = overview(data, tokenizer) | {"plan": asdict(plan), "memory": asdict(needed)}
        print(json.dumps(record, ensure_ascii=False))
        return
    shown.show(data, tokenizer)
    console().print()
    for line in _described(data, plan, needed):
        console().print(line, highlight=False)


def announce(data: Data, plan: TrainingPlan, needed: TrainingMemory) -> None:
    """What is about to be done."""
    out = console(stderr=True)
    count = len(data.train)
    out.print(f"{data.format}: {count} samples, {len(data.valid)} to validate on", style="title")
    for line in (*data.notes, *_described(data, plan, needed)):
        out.print(line)  # a terminal would fold it inside of words


def _described(data: Data, plan: TrainingPlan, needed: TrainingMemory) -> list[str]:
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
    from minicpm_mlx.train.tracking.trackers import tracker

    if replies < 0:
        raise InvalidArgumentError(f"replies must be 0 or more, got {replies}")
    if report is not None:
        tracker(report, "", {}, Path())


def listener(
    stack: ExitStack, folder: Path, report: str | None, as_json: bool, plan: TrainingPlan
) -> Listener:
    """Whoever is told of the run: a screen or JSON, a log, a tracker. `stack` ends them."""
    from minicpm_mlx.distributed import collectives
    from minicpm_mlx.train.tracking.jsonl_log import JsonLog
    from minicpm_mlx.train.tracking.trackers import tracker

    from .progress import JsonLines, Screen

    if collectives.rank() != 0:
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


def close(model: str, folder: Path, result: TrainingResult, as_json: bool) -> None:
    """What came of it, and how to go on."""
    from minicpm_mlx.distributed import collectives

    if collectives.rank() != 0:
        return
    drawn = _draw(folder)
    if as_json:
        record: dict[str, Any] = asdict(result) | {"folder": str(result.folder)}
        print(json.dumps({"event": "ended"} | record, ensure_ascii=False))
        return
    out = console()
    words = Texts(None if out.file.isatty() else "en")

    def say(key: str, style: str = "", **values: object) -> None:
        text = words.pick(*SAID[key]).format(**values)
        out.print(text, style=style, soft_wrap="path" in values)  # which is copied

    if result.best is not None:
        key = "best" if result.best_step else "no_better"
        say(key, loss=result.best, step=result.best_step)
    for name, value in (result.test or {}).items():
        say("test", name=name, value=value)
    if drawn:
        say("curve", path=drawn)
    if not result.complete:
        say("resume", "warning")
    say("chat", "title")
    out.print(f"  {command(model, result)}", highlight=False, soft_wrap=True)


def command(model: str, result: TrainingResult) -> str:
    """That starts a chat with the result."""
    folder = str(result.folder)
    words = ["--model", folder] if result.whole else ["--model", model, "--adapter", folder]
    return shlex.join(["minicpm-mlx", "chat", *words])


def _draw(folder: Path) -> Path | None:
    from minicpm_mlx.errors import MiniCPMError
    from minicpm_mlx.train.tracking.curve import draw_curve
    from minicpm_mlx.train.tracking.jsonl_log import read_log

    path = folder / CURVE
    with suppress(MiniCPMError):  # no matplotlib, or no step yet
        draw_curve(read_log(folder / LOG), path, folder.resolve().name)
        return path
    return None
