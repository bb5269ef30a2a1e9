"""The options of `lora` and `dpo`, by group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def _option(panel: str, help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel)


# Data

_DATA = "Data"
Data = Annotated[
    Path,
    _option(_DATA, "File (.jsonl .json .txt .csv .parquet), or folder of train, valid, test."),
]
MaxSeqLength = Annotated[int, _option(_DATA, "Tokens a sample may have.")]
Overlong = Annotated[str | None, _option(_DATA, "Longer samples: truncate, split or drop.")]
Mask = Annotated[str, _option(_DATA, "Learn every `assistant` turn, the `last`, or `all`.")]
SkipBad = Annotated[int, _option(_DATA, "Go on past so many bad lines.")]
ValFraction = Annotated[float, _option(_DATA, "Part to validate on, where there is no such file.")]

# What is trained

_WHAT = "What is trained"
FineTuneType = Annotated[str, _option(_WHAT, "lora, dora or full.")]
Rank = Annotated[int, _option(_WHAT, "Of an adapter.")]
Alpha = Annotated[float | None, _option(_WHAT, "Its weight; default: twice the rank.")]
RsLora = Annotated[bool, _option(_WHAT, "Weigh by the root of the rank.", "--rslora")]
Dropout = Annotated[float, _option(_WHAT, "Share of its inputs that is left out.")]
NumLayers = Annotated[int | None, _option(_WHAT, "The last so many layers; default: all.")]
Modules = Annotated[str | None, _option(_WHAT, "Such as q_proj,v_proj; default: all projections.")]

# How

_HOW = "How"
Loss = Annotated[str | None, _option(_HOW, "For preferences: dpo (default), ipo, orpo; kto.")]
Beta = Annotated[float | None, _option(_HOW, "How strong they are; default: 0.1.")]
LabelSmoothing = Annotated[float, _option(_HOW, "Of dpo: share of pairs the wrong way round.")]
LengthNormalized = Annotated[
    bool, _option(_HOW, "Of dpo and ipo: means over tokens.", "--length-normalized")
]
Iters = Annotated[int | None, _option(_HOW, "Optimizer steps.")]
Epochs = Annotated[float | None, _option(_HOW, "Passes over the data; default: 3.")]
BatchSize = Annotated[
    int | None, _option(_HOW, "Samples in memory at once; default: what fits, up to 4.")
]
GradAccumulationSteps = Annotated[
    int | None, _option(_HOW, "Batches a step; default: so that 4 samples are one.")
]
GradCheckpoint = Annotated[
    bool | None,
    _option(
        _HOW,
        "Less memory, more time; default: where it must be, and on x86.",
        "--grad-checkpoint/--no-grad-checkpoint",
    ),
]
LearningRate = Annotated[float | None, _option(_HOW, "Default: 2e-4; full 1e-5; preferences 2e-5.")]
LrSchedule = Annotated[str, _option(_HOW, "cosine, linear, constant or wsd.")]
Warmup = Annotated[int | None, _option(_HOW, "Steps; default: a twentieth of all.")]
Optimizer = Annotated[str, _option(_HOW, "adamw, adafactor, lion, muon or sgd.")]
WeightDecay = Annotated[float, _option(_HOW, "Of matrices.")]
Clip = Annotated[float, _option(_HOW, "Largest norm of the gradients.")]
Seed = Annotated[int, _option(_HOW, "Same seed, same run.")]

# The run

_RUN = "The run"
AdapterPath = Annotated[Path, _option(_RUN, "Folder for the result.", "--adapter-path")]
Resume = Annotated[bool, _option(_RUN, "Go on with the run in that folder.", "--resume")]
Patience = Annotated[int | None, _option(_RUN, "End after so many validations in vain.")]
StepsPerEval = Annotated[int | None, _option(_RUN, "Validate so often; default: ten times.")]
SaveEvery = Annotated[int | None, _option(_RUN, "Save so often; default: ten times.")]
Test = Annotated[bool, _option(_RUN, "At the end, loss on the test set.", "--test")]

# What one sees

_SEE = "What one sees"
DryRun = Annotated[bool, _option(_SEE, "Show data and memory, and end.", "--dry-run")]
StepsPerReport = Annotated[int | None, _option(_SEE, "Default: a twentieth of all, at most 10.")]
Replies = Annotated[int, _option(_SEE, "Validation prompts answered before and after.")]
Json = Annotated[bool, _option(_SEE, "Print what happens as lines of JSON.", "--json")]
Report = Annotated[str | None, _option(_SEE, "Also to wandb, tensorboard or swanlab.")]
