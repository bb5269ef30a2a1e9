"""A run from what its user gave: the rest follows from the data, the model and this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..arguments import at_least_one, number, whole
from ..distributed import collectives
from ..errors import InvalidArgumentError
from ..model.config import Config
from .data.batches import length
from .data.dataset import Data
from .lora import LoRAConfig, check
from .memory import TrainingMemory, fit_to_memory
from .objectives import CrossEntropy, Objective, PreferenceLoss
from .optimizer import Optimizer, Schedule

SAMPLES = 4
"""A step, by default."""

EPOCHS = 3


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What the user gave; None: choose."""

    iters: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    checkpointing: bool | None = None
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: int | None = None
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    clip: float = 1.0
    report_every: int | None = None
    evaluate_every: int | None = None
    save_every: int | None = None
    patience: int | None = None
    seed: int = 0


def plan_for(
    data: Data,
    wishes: TrainingOptions,
    config: Config,
    method: LoRAConfig,
    *,
    dtype: str | None = None,
) -> tuple[TrainingPlan, TrainingMemory]:
    """The run over `data` of a model, so that it fits in memory if it can, and what it needs.

    InvalidArgumentError: wishes that contradict each other.
    """
    check(method, config)
    Optimizer(wishes.optimizer, wishes.weight_decay)  # or it says what is wrong
    if wishes.iters is not None and wishes.epochs is not None:
        raise InvalidArgumentError("--iters and --epochs both say how long; leave one")
    if wishes.patience is not None and not data.valid:
        raise InvalidArgumentError("--patience needs a validation set, and there is none")
    if wishes.iters is not None:
        at_least_one("iters", wishes.iters)
    if wishes.batch_size is not None:
        at_least_one("batch-size", wishes.batch_size)
    needed = fit_to_memory(
        config,
        method,
        samples=min(SAMPLES, len(data.train)),
        batch_size=wishes.batch_size,
        checkpointing=wishes.checkpointing,
        length=max(map(length, [*data.train, *data.valid])),
        kind=data.kind,
        optimizer=wishes.optimizer,
        dtype=dtype,
    )
    size, checkpointing = needed.batch_size, needed.checkpointing
    accumulate = wishes.accumulate
    if accumulate is None:
        few = min(SAMPLES, len(data.train))
        accumulate = max(1, few // (size * collectives.size()))
    a_step = size * at_least_one("grad-accumulation-steps", accumulate)
    per_epoch = -(-len(data.train) // (a_step * collectives.size()))
    steps = wishes.iters
    if steps is None:
        epochs = EPOCHS if wishes.epochs is None else number("epochs", wishes.epochs)
        if not 0 < epochs < float("inf"):
            raise InvalidArgumentError(f"epochs must be more than 0, got {epochs:g}")
        steps = max(1, round(epochs * per_epoch))
    usual = 2e-5 if data.kind != "sft" else 1e-5 if method.kind == "full" else 2e-4
    warmup = wishes.warmup if wishes.warmup is not None else min(100, steps // 20)
    often = max(1, -(-steps // 10))
    plan = TrainingPlan(
        steps=steps,
        batch_size=size,
        accumulate=accumulate,
        checkpointing=checkpointing,
        schedule=Schedule(
            kind=wishes.schedule,
            peak=usual if wishes.learning_rate is None else wishes.learning_rate,
            warmup=warmup,
        ),
        optimizer=wishes.optimizer,
        weight_decay=wishes.weight_decay,
        clip=wishes.clip,
        report_every=_or(wishes.report_every, min(10, max(1, steps // 20))),
        evaluate_every=_or(wishes.evaluate_every, often),
        save_every=_or(wishes.save_every, often),
        patience=wishes.patience,
        seed=wishes.seed,
    )
    return plan, needed


def _or(given: int | None, usual: int) -> int:
    return usual if given is None else given


def objective_for(
    kind: str,
    *,
    loss: str | None = None,
    beta: float | None = None,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
) -> Objective:
    """What is made small on data of a kind ("sft", "preference" or "kto").

    InvalidArgumentError: options of another.
    """
    if kind == "sft":
        if loss is not None or beta is not None or label_smoothing or length_normalized:
            raise InvalidArgumentError(
                "loss, beta, label-smoothing and length-normalized are for preferences, and these "
                "data have none"
            )
        return CrossEntropy()
    return PreferenceLoss(
        loss=loss or ("kto" if kind == "kto" else "dpo"),
        beta=beta,
        label_smoothing=label_smoothing,
        length_normalized=length_normalized,
    )


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How a run goes; sizes are of one process."""

    steps: int
    batch_size: int = 4
    """Samples in memory at once."""
    accumulate: int = 1
    """Batches a step."""
    schedule: Schedule = field(default_factory=Schedule)
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest norm of a step's gradients together."""
    checkpointing: bool = False
    """Compute layers again for their gradients, rather than keep what they computed."""
    report_every: int = 10
    evaluate_every: int = 100
    save_every: int = 100
    patience: int | None = None
    """Validations without a lower loss after which the run ends; None: never."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, option in {
            "steps": "iters",
            "batch_size": "batch-size",
            "accumulate": "grad-accumulation-steps",
            "report_every": "steps-per-report",
            "evaluate_every": "steps-per-eval",
            "save_every": "save-every",
        }.items():
            at_least_one(option, getattr(self, name))
        if self.patience is not None:
            at_least_one("patience", self.patience)
        if not number("clip", self.clip) > 0:
            raise InvalidArgumentError(f"clip must be more than 0, got {self.clip:g}")
        if not 0 <= whole("seed", self.seed) < 2**64:
            raise InvalidArgumentError(f"seed must be from 0 to 2**64 - 1, got {self.seed}")
        if self.schedule.warmup >= self.steps > 1:
            raise InvalidArgumentError(
                f"warmup must be less than the {self.steps} steps, got {self.schedule.warmup}"
            )

    @property
    def samples_a_step(self) -> int:
        """Over all processes."""
        return self.batch_size * self.accumulate * collectives.size()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the steps, and must not change when a run is resumed."""
        kept = ("report_every", "evaluate_every", "save_every", "patience", "checkpointing")
        found = {name: value for name, value in asdict(self).items() if name not in kept}
        return found | {"processes": collectives.size()}
