"""A run's numbers for the trackers people watch runs with: TensorBoard, Weights & Biases, SwanLab.

None of them is uploaded to unless its user has logged in to it on this machine; without that the
run is kept in a folder that the tracker's own `sync` command uploads later.
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

from ...errors import InvalidArgumentError, MissingPackageError
from .events import (
    Event,
    Started,
    Trained,
    Validated,
)

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "swanlab": "swanlab"}
"""By tracker: the package that writes for it. tensorboardX needs but numpy and protobuf."""

PROJECT = "minicpm-mlx"


@dataclass(frozen=True)
class Sink:
    """Where numbers go."""

    write: Callable[[int, Mapping[str, float]], object]
    """At a step, numbers by name."""
    close: Callable[[], object]
    advice: str
    """How to look at them."""


Opener = Callable[[Any, str, Mapping[str, Any], Path, int], Sink]
"""Opens a sink: its package, the run's name and settings, a folder, steps already done."""


class Tracker:
    """A listener that passes a run's numbers on; open from its first event until `close`.

    What each number is called: see `metrics`. A resumed run goes on in the same TensorBoard curve,
    and is a run of its own elsewhere.
    """

    def __init__(self, open_sink: Callable[[int], Sink]) -> None:
        self._open = open_sink
        self._sink: Sink | None = None

    def __call__(self, event: Event) -> None:
        if self._sink is None:
            self._sink = self._open(event.step if isinstance(event, Started) else 0)
        if found := metrics(event):
            self._sink.write(event.step, found)

    @property
    def advice(self) -> str:
        """How to look at the numbers; empty before the first event."""
        return self._sink.advice if self._sink else ""

    def close(self) -> None:
        """Write what is held back; does nothing the second time."""
        if self._sink is not None:
            self._sink.close()
        self._sink = None


def tracker(name: str, run_name: str, config: Mapping[str, Any], folder: Path) -> Tracker:
    """A listener for the tracker `name`, which keeps its files in `folder`.

    `config` holds the run's settings: what JSON can hold. InvalidArgumentError for a name that is
    none of PACKAGES; MissingPackageError, at once, where its package is not installed.
    """
    if name not in PACKAGES:
        raise InvalidArgumentError(f"report must be one of {', '.join(PACKAGES)}, got {name!r}")
    package = PACKAGES[name]
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else it looks up where to, offline
    try:
        module = import_module(package)
    except ImportError:
        raise MissingPackageError(f"{name} needs {package}: pip install {package}") from None
    settings = json.loads(json.dumps(dict(config), default=str))
    return Tracker(lambda step: OPENERS[name](module, run_name, settings, folder, step))


def metrics(event: Event) -> dict[str, float]:
    """The numbers of an event by name, such as "train/loss" and "valid/loss"; NaN is left out.

    Memory is in GB of 10⁹ bytes; speed in tokens a second.
    """
    if isinstance(event, Trained):
        found = {
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
        found = {"valid/loss": event.loss}
        found |= {f"valid/{name}": value for name, value in event.extra.items()}
    else:
        return {}
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def _tensorboard(
    module: Any, run_name: str, config: Mapping[str, Any], folder: Path, step: int
) -> Sink:
    # What a run that was resumed had written of later steps is hidden.
    purge = {"purge_step": step + 1} if step else {}
    writer = module.SummaryWriter(logdir=str(folder), flush_secs=10, **purge)
    shown = json.dumps({"name": run_name, **config}, ensure_ascii=False, indent=2)
    writer.add_text("settings", "\n".join(f"    {line}" for line in shown.split("\n")), step)

    def write(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return Sink(write, writer.close, f"tensorboard --logdir '{folder}'")


def _wandb(module: Any, run_name: str, config: Mapping[str, Any], folder: Path, step: int) -> Sink:
    mode = os.environ.get("WANDB_MODE") or ("online" if _wandb_login() else "offline")
    folder.mkdir(parents=True, exist_ok=True)
    run = module.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run_name,
        config=dict(config),
        dir=str(folder),
        mode=mode,
        # The terminal is ours: what it shows is neither written over nor sent anywhere.
        settings=module.Settings(silent=True, console="off"),
    )
    kept = Path(run.dir).parent

    def write(step: int, numbers: Mapping[str, float]) -> None:
        run.log(dict(numbers), step=step)

    return Sink(write, run.finish, f"wandb sync '{kept}'" if run.offline else str(run.url))


def _wandb_login() -> bool:
    """Whether there is a key to upload with: in the environment, or from `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


def _swanlab(
    module: Any, run_name: str, config: Mapping[str, Any], folder: Path, step: int
) -> Sink:
    found = module.Settings(terminal={"proxy_type": "none"})  # the terminal is ours
    offline = found.mode == "online" and not found.api_key
    folder.mkdir(parents=True, exist_ok=True)
    with redirect_stdout(sys.stderr):  # results alone go to standard output
        run = module.init(
            project=found.project.name or PROJECT,
            name=run_name,
            config=dict(config),
            log_dir=str(folder),
            mode="offline" if offline else found.mode,
            settings=found,
        )

    def write(step: int, numbers: Mapping[str, float]) -> None:
        run.log(dict(numbers), step=step)

    def close() -> None:
        with redirect_stdout(sys.stderr):
            run.finish()

    return Sink(write, close, f"swanlab sync '{folder}/run-…'" if offline else "")


OPENERS: dict[str, Opener] = {"tensorboard": _tensorboard, "wandb": _wandb, "swanlab": _swanlab}
