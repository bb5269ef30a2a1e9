"""The options --think and --think-tokens."""

from __future__ import annotations

from dataclasses import dataclass

from minicpm_mlx.arguments import Limit
from minicpm_mlx.errors import InvalidArgumentError

from . import options


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ThinkingOptions:
    """Whether a model thinks before it answers, and how long."""

    think: bool | None = options.option(
        "Think before the answer, or not; default: as the model's template has it.",
        "--think/--no-think",
    )
    think_tokens: int | None = options.option(
        "Longest thought, in tokens; the answer follows.", limit=Limit(least=0, whole=True)
    )

    def check(self, model: str) -> None:
        """InvalidArgumentError for a model that does not think, before its weights are loaded."""
        if self.think is False and self.think_tokens is not None:
            raise InvalidArgumentError("--no-think contradicts --think-tokens; leave one out")
        if (self.think or self.think_tokens is not None) and not (
            options.tokenizer_and_config(model)[0].thinking
        ):
            given = "--think" if self.think else "--think-tokens"
            raise InvalidArgumentError(
                f"{model} does not think before it answers; leave out {given}"
            )
