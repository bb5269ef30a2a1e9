"""Sends the metrics of a run to TensorBoard, Weights & Biases or SwanLab.

Nothing is uploaded unless the user is logged in on this machine; otherwise the run is kept in a
folder that the tracker's own `sync` command can upload later. (mlx-lm's callbacks for wandb and
SwanLab ask for a login, write to the terminal, and never finish the run.)
"""

from __future__ import annotations

import json
import math
import netrc
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...arguments import one_of
from ...errors import MissingPackageError
from .events import Event, Started, Trained, Validated

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "swanlab": "swanlab"}
"""The package of each tracker. tensorboardX needs only numpy and protobuf."""

PROJECT = "minicpm-mlx"


@dataclass(frozen=True)
class MetricsWriter:
    """An open run of a tracker."""

    write: Callable[[int, Mapping[str, float]], object]
    """Writes metrics by name, at a step."""
    close: Callable[[], object]


Opener = Callable[[Any, str, Mapping[str, Any], Path, int], MetricsWriter]
"""Opens a writer, given the package, the run's name and settings, a folder, and steps done."""


class Tracker:
    """A listener that writes the metrics of a run, from its first event until `close`.

    See `metrics` for their names. A resumed run continues the same TensorBoard curve, and is a new
    run elsewhere.
    """

    def __init__(self, open_writer: Callable[[int], MetricsWriter]) -> None:
        self._open = open_writer
        self._writer: MetricsWriter | None = None

    def __call__(self, event: Event) -> None:
        if self._writer is None:
            self._writer = self._open(event.step if isinstance(event, Started) else 0)
        if values := metrics(event):
            self._writer.write(event.step, values)

    def close(self) -> None:
        """Flushes the metrics. Further calls do nothing."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None


def tracker(name: str, run_name: str, config: Mapping[str, Any], folder: Path) -> Tracker:
    """Returns a listener for the tracker `name`, which keeps its files in `folder`.

    `config` holds the run's settings. InvalidArgumentError: `name` is not in PACKAGES;
    MissingPackageError: its package is not installed.
    """
    one_of("report", name, PACKAGES)
    package = PACKAGES[name]
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would look up a server, offline
    try:
        module = import_module(package)
    except ImportError:
        raise MissingPackageError(f"{name} needs {package}: pip install {package}") from None
    settings = json.loads(json.dumps(dict(config), default=str))
    return Tracker(lambda step: OPENERS[name](module, run_name, settings, folder, step))


def metrics(event: Event) -> dict[str, float]:
    """The finite numbers of an event by name, such as "train/loss" and "valid/loss".

    Memory is in GB of 10⁹ bytes, speed in tokens per second.
    """
    if isinstance(event, Trained):
        values = {
            "train/loss": event.loss,
            "train/learning_rate": event.learning_rate,
            "train/gradient_norm": event.gradient_norm,
            "train/tokens": event.tokens,
            "train/tokens_per_second": event.tokens_per_second,
            "train/epoch": event.epoch,
            "train/peak_memory_gb": event.peak_memory / 1e9,
            **{f"train/{name}": value for name, value in event.extra.items()},
        }
    elif isinstance(event, Validated):
        values = {"valid/loss": event.loss}
        values |= {f"valid/{name}": value for name, value in event.extra.items()}
    else:
        return {}
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def _tensorboard(
    module: Any, run_name: str, config: Mapping[str, Any], folder: Path, step: int
) -> MetricsWriter:
    # Hides the steps that the run will repeat after resuming.
    purge = {"purge_step": step + 1} if step else {}
    writer = module.SummaryWriter(logdir=str(folder), flush_secs=10, **purge)
    text = json.dumps({"name": run_name, **config}, ensure_ascii=False, indent=2)
    writer.add_text("settings", "\n".join(f"    {line}" for line in text.split("\n")), step)

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return MetricsWriter(write, writer.close)


def _wandb(
    module: Any, run_name: str, config: Mapping[str, Any], folder: Path, step: int
) -> MetricsWriter:
    mode = os.environ.get("WANDB_MODE") or ("online" if _wandb_login() else "offline")
    folder.mkdir(parents=True, exist_ok=True)
    run = module.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run_name,
        config=dict(config),
        dir=str(folder),
        mode=mode,
        # wandb must not draw over the progress display, nor upload it.
        settings=module.Settings(silent=True, console="off"),
    )
    return MetricsWriter(lambda step, values: run.log(dict(values), step=step), run.finish)


def _wandb_login() -> bool:
    """Whether the environment or `wandb login` provides a key to upload with."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


def _swanlab(
    module: Any, run_name: str, config: Mapping[str, Any], folder: Path, step: int
) -> MetricsWriter:
    settings = module.Settings(terminal={"proxy_type": "none"})  # do not record the terminal
    offline = settings.mode == "online" and not settings.api_key
    folder.mkdir(parents=True, exist_ok=True)
    with redirect_stdout(sys.stderr):  # standard output is for results
        run = module.init(
            project=settings.project.name or PROJECT,
            name=run_name,
            config=dict(config),
            log_dir=str(folder),
            mode="offline" if offline else settings.mode,
            settings=settings,
        )

    def close() -> None:
        with redirect_stdout(sys.stderr):
            run.finish()

    return MetricsWriter(lambda step, values: run.log(dict(values), step=step), close)


OPENERS: dict[str, Opener] = {"tensorboard": _tensorboard, "wandb": _wandb, "swanlab": _swanlab}
