"""The reports of `lora` before, during and after a run."""

from __future__ import annotations

import shlex
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm_mlx.arguments import Limit
from minicpm_mlx.distributed import collectives
from minicpm_mlx.errors import MiniCPMError

from ..render.texts import Texts
from ..render.theme import console
from ..streams import print_json
from . import data_preview

if TYPE_CHECKING:
    from minicpm_mlx.text.tokenizer import Tokenizer
    from minicpm_mlx.train.data.dataset import Data
    from minicpm_mlx.train.finetune import TrainingResult
    from minicpm_mlx.train.memory import TrainingMemory
    from minicpm_mlx.train.planning import TrainingPlan
    from minicpm_mlx.train.tracking.events import Event, Listener

LOG, CURVE = "log.jsonl", "curve.png"
"""In the run's folder."""


def preview(
    data: Data, tokenizer: Tokenizer, plan: TrainingPlan, needed: TrainingMemory, as_json: bool
) -> None:
    """Shows the data, the plan and the memory it needs, for --dry-run."""
    from minicpm_mlx.train.data.preview import overview

    if as_json:
        record = {"plan": asdict(plan), "validation": _validation(data, plan)}
        print_json(overview(data, tokenizer) | record | {"memory": asdict(needed)})
        return
    data_preview.show(data, tokenizer)
    console().print()
    for line in _plan_lines(data, plan, needed):
        console().print(line, highlight=False)


def announce(data: Data, plan: TrainingPlan, needed: TrainingMemory) -> None:
    """Prints the plan of a run that starts."""
    stderr = console(stderr=True)
    counts = f"{len(data.train)} samples, {len(data.valid)} to validate on"
    stderr.print(f"{data.format}: {counts}", style="title")
    for line in (*data.notes, *_plan_lines(data, plan, needed)):
        stderr.print(line)  # which wraps between words


def _plan_lines(data: Data, plan: TrainingPlan, needed: TrainingMemory) -> list[str]:
    epochs = plan.steps * plan.samples_a_step / max(1, len(data.train))
    size = f"{plan.batch_size} samples a batch"
    if plan.accumulate > 1:
        size += f", {plan.accumulate} batches a step"
    fits = [] if needed.fits else ["this does not fit"]
    rate = f"learning rate {plan.schedule.peak:g} ({plan.schedule.kind})"
    return [
        f"{plan.steps} steps, {epochs:.1f} epochs: {size}; {rate}",
        _between_steps(data, plan),
        needed.described,
        *fits,
    ]


def _validation(data: Data, plan: TrainingPlan) -> dict[str, float]:
    """How often and on how many samples a run validates, and the share of its time."""
    from minicpm_mlx.train.validation import times_of, validation_share

    every, samples = plan.evaluate_every, plan.validation_samples
    share = validation_share(
        data, steps=plan.steps, samples_a_step=plan.samples_a_step, every=every, samples=samples
    )
    count = samples or len(data.valid)
    return {"times": times_of(plan.steps, every) if count else 0, "samples": count, "share": share}


def _between_steps(data: Data, plan: TrainingPlan) -> str:
    save = f"checkpoints every {plan.save_every} steps"
    if plan.save_every is None:
        save = f"checkpoints every {-(-plan.steps // 10)} steps, in at most a tenth of the time"
    if not data.valid:
        return f"no validation; {save}"
    numbers = _validation(data, plan)
    return (
        f"validation: {numbers['times']:.0f} times, every {plan.evaluate_every} steps, on "
        f"{numbers['samples']:.0f} of {len(data.valid)} samples, about {numbers['share']:.0%} of "
        f"the time; {save}"
    )


def check(report: str | None, replies: int) -> None:
    """MissingPackageError or InvalidArgumentError for reports that cannot be made."""
    from minicpm_mlx.train.tracking.trackers import tracker

    Limit(least=0, whole=True).check("replies", replies)
    if report is not None:
        tracker(report, "", {}, Path())


def listener(
    stack: ExitStack, folder: Path, report: str | None, as_json: bool, plan: TrainingPlan
) -> Listener:
    """Sends events to the screen or as JSON, to a log and a tracker; `stack` closes them."""
    from minicpm_mlx.train.tracking.jsonl_log import JsonLog
    from minicpm_mlx.train.tracking.trackers import tracker

    from .progress import JsonLines, Screen

    if collectives.rank() != 0:
        return lambda event: None
    folder.mkdir(parents=True, exist_ok=True)
    listeners: list[Listener] = [JsonLog(folder / LOG)]
    if report is not None:
        run = tracker(report, folder.resolve().name, plan.fingerprint, folder / report)
        stack.callback(run.close)
        listeners.append(run)
    screen: Listener = JsonLines() if as_json else stack.enter_context(Screen())

    def send(event: Event) -> None:
        for listen in listeners:
            listen(event)
        with suppress(OSError):  # the terminal has gone; the run continues
            screen(event)

    return send


def close(model: str, folder: Path, result: TrainingResult, as_json: bool) -> None:
    """Prints the result, and the command that uses it."""
    if collectives.rank() != 0:
        return
    curve = _draw_curve(folder)
    if as_json:
        record: dict[str, Any] = asdict(result) | {"folder": str(result.folder)}
        print_json({"event": "ended"} | record)
        return
    out = console()
    texts = Texts(None if out.file.isatty() else "en")
    if result.best is not None:
        key = "train.best" if result.best_step else "train.no_better"
        key = key if result.validated else "train.not_validated"
        out.print(texts(key, loss=result.best, step=result.best_step))
    for name, value in (result.test or {}).items():
        out.print(texts("train.test", name=name, value=value))
    if curve:
        out.print(texts("train.curve", path=curve), soft_wrap=True)  # so that it can be copied
    if not result.complete:
        out.print(texts("train.resume"), style="warning")
    out.print(texts("train.chat"), style="title")
    out.print(f"  {_chat_command(model, result)}", highlight=False, soft_wrap=True)


def _chat_command(model: str, result: TrainingResult) -> str:
    folder = str(result.folder)
    options = ["--model", folder] if result.whole else ["--model", model, "--adapter", folder]
    return shlex.join(["minicpm-mlx", "chat", *options])


def _draw_curve(folder: Path) -> Path | None:
    from minicpm_mlx.train.tracking.curve import draw_curve
    from minicpm_mlx.train.tracking.jsonl_log import read_log

    path = folder / CURVE
    with suppress(MiniCPMError):  # no matplotlib, or no step yet
        draw_curve(read_log(folder / LOG), path, folder.resolve().name)
        return path
    return None
