"""Plans a run: fills in what the user left open from the data, the model and this machine."""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, field
from typing import Any

import mlx.core as mx

from .. import device
from ..arguments import check_limits, limited
from ..distributed import collectives
from ..errors import InvalidArgumentError
from ..memory import parameter_count
from ..model.config import Config
from .data.batches import length
from .data.dataset import Data
from .lora import PACKED, LoRAConfig, check
from .memory import TrainingMemory, fit_to_memory
from .objectives import CrossEntropy, Objective, PreferenceLoss
from .optimizer import Optimizer, Schedule
from .validation import plan_validation

SAMPLES = 4
"""Samples of a step by default."""

EPOCHS = 3
"""Epochs by default."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The user's options; None lets `plan_for` choose."""

    iters: int | None = limited(None, least=1, whole=True)
    epochs: float | None = limited(None, above=0, below=math.inf)
    batch_size: int | None = limited(None, least=1, whole=True)
    accumulate: int | None = limited(None, least=1, whole=True)
    checkpointing: bool | None = None
    learning_rate: float | None = limited(None, above=0, below=math.inf)
    schedule: str = "cosine"
    warmup: int | None = limited(None, least=0, whole=True)
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    clip: float = limited(1.0, above=0)
    report_every: int | None = limited(None, least=1, whole=True)
    evaluate_every: int | None = limited(None, least=1, whole=True)
    save_every: int | None = limited(None, least=1, whole=True)
    patience: int | None = limited(None, least=1, whole=True)
    seed: int = limited(0, least=0, most=2**64 - 1, whole=True)

    def __post_init__(self) -> None:
        check_limits(self)
        Optimizer(self.optimizer, self.weight_decay)  # checks both
        Schedule(kind=self.schedule)
        if self.iters is not None and self.epochs is not None:
            raise InvalidArgumentError("--iters and --epochs both set the length; leave one out")


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """All settings of a run; sizes are per process."""

    steps: int = limited(MISSING, least=1, whole=True)
    batch_size: int = limited(4, least=1, whole=True)
    """Samples in memory at once."""
    accumulate: int = limited(1, least=1, whole=True)
    """Batches per step."""
    schedule: Schedule = field(default_factory=Schedule)
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    clip: float = limited(1.0, above=0)
    """Largest joint norm of a step's gradients."""
    checkpointing: bool = False
    """Compute layers again for their gradients instead of keeping their activations."""
    report_every: int = limited(10, least=1, whole=True)
    evaluate_every: int = limited(100, least=1, whole=True)
    validation_samples: int | None = limited(None, least=1, whole=True)
    """Validation samples to measure the loss on; None: all."""
    save_every: int | None = limited(None, least=1, whole=True)
    """None: a tenth of all steps, or more where saving takes over a tenth of the time."""
    patience: int | None = limited(None, least=1, whole=True)
    """Validations without a lower loss after which the run ends; None: never."""
    seed: int = limited(0, least=0, most=2**64 - 1, whole=True)

    def __post_init__(self) -> None:
        check_limits(self)
        if self.schedule.warmup >= self.steps > 1:
            raise InvalidArgumentError(
                f"must be less than the {self.steps} steps, got {self.schedule.warmup}",
                field="warmup",
            )

    @property
    def samples_a_step(self) -> int:
        """Over all processes."""
        return self.batch_size * self.accumulate * collectives.size()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The settings that decide the steps and which one is kept, and must not change when a run
        is resumed."""
        free = ("report_every", "save_every", "patience", "checkpointing")
        settings = {name: value for name, value in asdict(self).items() if name not in free}
        return settings | {"processes": collectives.size()}


def plan_for(
    data: Data,
    options: TrainingOptions,
    config: Config,
    method: LoRAConfig,
    *,
    dtype: str | mx.Dtype | None = None,
) -> tuple[TrainingPlan, TrainingMemory]:
    """Returns a plan that fits in memory if one can, and its memory estimate.

    InvalidArgumentError: the options contradict the data or the model.
    """
    check(method, config)
    if method.kind == "full" and config.quantization and _stays_packed(config, dtype):
        raise InvalidArgumentError(PACKED)
    if options.patience is not None and not data.valid:
        raise InvalidArgumentError("needs a validation set, and there is none", field="patience")
    samples = min(SAMPLES, len(data.train))
    memory = fit_to_memory(
        config,
        method,
        samples=samples,
        batch_size=options.batch_size,
        checkpointing=options.checkpointing,
        length=max(map(length, [*data.train, *data.valid])),
        kind=data.kind,
        optimizer=options.optimizer,
        dtype=dtype,
    )
    at_once = memory.batch_size * collectives.size()
    accumulate = _or(options.accumulate, max(1, samples // at_once))
    steps = options.iters
    if steps is None:
        per_epoch = -(-len(data.train) // (at_once * accumulate))
        epochs = EPOCHS if options.epochs is None else options.epochs
        steps = max(1, round(epochs * per_epoch))
    learning_rate = options.learning_rate
    if learning_rate is None:
        learning_rate = 2e-5 if data.kind != "sft" else 1e-5 if method.kind == "full" else 2e-4
    samples_a_step = at_once * accumulate
    evaluate_every, validation_samples = options.evaluate_every, None
    if evaluate_every is None:
        evaluate_every, validation_samples = plan_validation(
            data, steps=steps, samples_a_step=samples_a_step, patience=options.patience
        )
    plan = TrainingPlan(
        steps=steps,
        batch_size=memory.batch_size,
        accumulate=accumulate,
        checkpointing=memory.checkpointing,
        schedule=Schedule(
            kind=options.schedule,
            peak=learning_rate,
            warmup=_or(options.warmup, min(100, steps // 20)),
        ),
        optimizer=options.optimizer,
        weight_decay=options.weight_decay,
        clip=options.clip,
        report_every=_or(options.report_every, min(10, max(1, steps // 20))),
        evaluate_every=evaluate_every,
        validation_samples=validation_samples,
        save_every=options.save_every,
        patience=options.patience,
        seed=options.seed,
    )
    return plan, memory


def _stays_packed(config: Config, dtype: str | mx.Dtype | None) -> bool:
    """Whether a quantized model is loaded as it is, which a CPU does only if memory is short."""
    compute = device.choose_dtype(mx.float16, dtype, fused=False)
    return device.unpack_to(compute, parameter_count(config)) is None


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def objective_for(
    kind: str,
    *,
    loss: str | None = None,
    beta: float | None = None,
    label_smoothing: float = 0.0,
    length_normalized: bool = False,
) -> Objective:
    """Returns the objective for data of a kind: "sft", "preference" or "kto".

    InvalidArgumentError: the options are for another kind.
    """
    if kind == "sft":
        given = {"loss": loss, "beta": beta, "label_smoothing": label_smoothing or None}
        given["length_normalized"] = length_normalized or None
        for name, value in given.items():
            if value is not None:
                raise InvalidArgumentError(
                    "is for preferences, and these data have none", field=name
                )
        return CrossEntropy()
    return PreferenceLoss(
        loss=loss or ("kto" if kind == "kto" else "dpo"),
        beta=beta,
        label_smoothing=label_smoothing,
        length_normalized=length_normalized,
    )
