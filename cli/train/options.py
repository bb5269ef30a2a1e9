"""The options of `lora` and `dpo`, in groups that become the library's own objects."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .. import options
from ..options import REQUIRED, option

if TYPE_CHECKING:
    from minicpm_mlx.train.data.dataset import DataOptions
    from minicpm_mlx.train.lora import LoRAConfig
    from minicpm_mlx.train.planning import TrainingOptions

_data = partial(option, panel="Data")
_parameter = partial(option, panel="Trained parameters")
_training = partial(option, panel="Training")
_run = partial(option, panel="Run")
_output = partial(option, panel="Output")


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ReadingGroup:
    """Fields of DataOptions but for the seed."""

    max_seq_length: int = _data("Most tokens of a sample.", default=2048)
    overlong: str | None = _data("Longer samples: truncate, split or drop.")
    mask: str = _data("Learn every `assistant` turn, the `last`, or `all`.", default="assistant")
    train_on: str = _data(
        "In replies, learn `thoughts` and answers, or `answers` alone; calls always.",
        default="thoughts",
    )
    skip_bad: int = _data("Skip up to this many bad lines.", default=0)
    ignore_columns: str | None = _data("Fields that may stay unread, such as id,messages.name.")
    valid_fraction: float = _data(
        "Part to validate on, if there is no such file.", "--val-fraction", default=0.1
    )


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class MethodGroup:
    """Fields of LoRAConfig."""

    kind: str = _parameter("lora, dora or full.", "--fine-tune-type", default="lora")
    rank: int = _parameter("Rank of the adapter.", default=8)
    alpha: float | None = _parameter("Its weight; default: twice the rank.")
    rank_stabilized: bool = _parameter("Scale by the root of the rank.", "--rslora", default=False)
    dropout: float = _parameter("Share of the adapter's inputs to drop.", default=0.0)
    layers: int | None = _parameter("Only the last layers; default: all.", "--num-layers")
    modules: str | None = _parameter("Such as q_proj,v_proj; default: all projections.")


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ObjectiveGroup:
    """Keywords of planning.objective_for."""

    loss: str | None = _training("For preferences: dpo (default), ipo, orpo; kto.")
    beta: float | None = _training("Strength of the preferences; default: 0.1.")
    label_smoothing: float = _training("Of dpo: assumed share of swapped pairs.", default=0.0)
    length_normalized: bool = _training("Of dpo and ipo: average over tokens.", default=False)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class TrainingGroup:
    """Fields of TrainingOptions."""

    iters: int | None = _training("Optimizer steps.")
    epochs: float | None = _training("Passes over the data; default: 3.")
    batch_size: int | None = _training("Samples in memory at once; default: what fits, up to 4.")
    accumulate: int | None = _training(
        "Batches in a step; default: so many that a step has 4 samples.",
        "--grad-accumulation-steps",
    )
    checkpointing: bool | None = _training(
        "Less memory, more time; default: if memory requires it, and on x86.",
        "--grad-checkpoint/--no-grad-checkpoint",
    )
    learning_rate: float | None = _training("Default: 2e-4; full 1e-5; preferences 2e-5.")
    schedule: str = _training("cosine, linear, constant or wsd.", "--lr-schedule", default="cosine")
    warmup: int | None = _training("Warmup steps; default: a twentieth of all.")
    optimizer: str = _training("adamw, adafactor, lion, muon or sgd.", default="adamw")
    weight_decay: float = _training("Weight decay of matrices.", default=0.0)
    clip: float = _training("Largest norm of the gradients.", default=1.0)
    seed: int = _training("Same seed, same run.", default=0)
    patience: int | None = _run("Stop after this many validations without a gain.")
    evaluate_every: int | None = _run(
        "Steps between validations, on all samples; default: what a tenth of the time allows.",
        "--steps-per-eval",
    )
    save_every: int | None = _run("Steps between checkpoints; default: likewise.")
    report_every: int | None = _output(
        "Steps between reports; default: a twentieth of all, at most 10.", "--steps-per-report"
    )


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class LoraOptions:
    """Options of `lora` and `dpo`."""

    context: typer.Context
    data: Path = _data(
        "File (.jsonl .json .txt .csv .parquet), or folder of train, valid, test.", default=REQUIRED
    )
    model: options.Model = options.DEFAULT_MODEL
    reading: ReadingGroup
    method: MethodGroup
    objective: ObjectiveGroup
    training: TrainingGroup
    adapter_path: Path = _run("Folder for the result.", default=Path("adapters"))
    resume: bool = _run("Resume the run in that folder.", default=False)
    test: bool = _run("Measure the loss on the test set at the end.", default=False)
    dry_run: bool = _output("Show data and memory, and stop.", default=False)
    replies: int = _output("Validation prompts to answer before and after.", default=2)
    report: str | None = _output("Also report to wandb, tensorboard or swanlab.")
    compute: options.Compute
    as_json: bool = _output("Print events as lines of JSON.", "--json", default=False)

    @property
    def folder(self) -> Path:
        return self.adapter_path.expanduser()

    def data_options(self) -> DataOptions:
        from minicpm_mlx.train.data.dataset import DataOptions

        names = (self.reading.ignore_columns or "").split(",")
        ignored = tuple(name.strip() for name in names if name.strip())
        given = vars(self.reading) | {"ignore_columns": ignored}
        return DataOptions(**given, seed=self.training.seed)

    def lora_config(self) -> LoRAConfig:
        from minicpm_mlx.train.lora import LoRAConfig

        names = self.method.modules
        modules = None if names is None else tuple(names.replace(" ", "").split(","))
        return LoRAConfig(**vars(self.method) | {"modules": modules})

    def training_options(self) -> TrainingOptions:
        from minicpm_mlx.train.planning import TrainingOptions

        return TrainingOptions(**vars(self.training))
