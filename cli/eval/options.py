"""The options of `eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from minicpm_mlx.arguments import limits

from .. import options, paths
from ..options import flag, option
from ..thinking_options import ThinkingOptions

if TYPE_CHECKING:
    from minicpm_mlx.evals.settings import EvalSettings


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class EvalOptions:
    """Options of `eval`."""

    context: typer.Context
    tasks: str | None = option(
        "all, or some of ceval, cmmlu, mmlu, humaneval, mbpp, gsm8k, math, bbh, bbh_cot, "
        "arc_easy, arc_challenge, hellaswag, separated by commas."
    )
    mode: str = option(
        "gen: read the replies. ppl: compare the options' likelihoods. both.", default="gen"
    )
    data: Path | None = option(
        "Folder with the data; default: downloaded from the hub.", check=paths.input_folder
    )
    model: options.BaseModel = None
    adapter: options.Adapter = None
    limit: int | None = option("Most questions of a subject; the seed chooses them.")
    subjects: str | None = option("Only these subjects or subsets, separated by commas.")
    shots: int | None = option(
        "Examples before a question; default: as many as UltraEval.", "--shots", "--num-fewshot"
    )
    sampling: str = option("greedy, or ultraeval: as for the published table.", default="greedy")
    seed: int = option("Seed of the questions, examples and replies.", default=0)
    chat_template: bool = option(
        "Ask in a user's message, not as plain text.",
        "--chat-template/--no-chat-template",
        default=False,
    )
    thinking: ThinkingOptions
    whole_replies: bool = flag("Generate on after the score is decided.")
    allow_code: bool = flag("Run programs the model writes, in a sandbox.")
    output: Path | None = option(
        "Folder of the run, resumed if it exists; default: eval-MODEL.", check=paths.output_folder
    )
    width: int = option("Replies generated at once.", "--batch", default=8)
    harness: str | None = option(
        "lm-eval: --tasks are lm-evaluation-harness's own.", choices=("lm-eval",)
    )
    include_path: Path | None = option(
        "Folder with more tasks for lm-eval.", check=paths.input_folder
    )
    compute: options.Compute
    as_json: options.Json = False

    @property
    def task_names(self) -> tuple[str, ...]:
        return _split(self.tasks or "")

    def checked_model(self) -> str | None:
        """The model, which is known to think if it is asked to."""
        if vars(self.thinking) == {"think": None, "think_tokens": None}:
            return self.model
        model = options.choose_model(self.model, [self.adapter])
        self.thinking.check(model)
        return model

    def settings(self) -> EvalSettings:
        from minicpm_mlx.evals.settings import EvalSettings

        limits(EvalSettings)["width"].check("--batch", self.width)
        names = [name for name in EvalSettings.__dataclass_fields__ if hasattr(self, name)]
        values = {name: getattr(self, name) for name in names}
        values |= vars(self.thinking)
        values |= {"tasks": self.task_names, "subjects": _split(self.subjects or "")}
        return EvalSettings(**values)


def _split(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
