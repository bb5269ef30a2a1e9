"""Log probabilities of answer options, from text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..engine.scoring.loglikelihood import Alternatives, score
from ..errors import InvalidArgumentError
from ..text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from ..lm.lm import LM


def loglikelihoods(
    lm: LM, prompts: Sequence[str], options: Sequence[Sequence[str]]
) -> list[list[list[float]]]:
    """For each prompt and each of its options the log probabilities of all tokens of both.

    Prompt and option are encoded as one text; its first token, which has no probability, is left
    out. ContextLengthError for a text longer than the model's context.

        loglikelihoods(lm, ["1 + 1 = "], [["2", "3"]])
    """
    if len(prompts) != len(options):
        raise InvalidArgumentError(
            f"expected options for each of {len(prompts)} prompts, got {len(options)} lists"
        )
    groups = (
        Alternatives(encoded(lm.tokenizer, prompt, texts))
        for prompt, texts in zip(prompts, options, strict=True)
    )
    found = dict(score(lm.model, groups, context=lm.context_length))
    return [[scores.logprobs for scores in found[place]] for place in range(len(prompts))]


def encoded(tokenizer: Tokenizer, prompt: str, options: Sequence[str]) -> list[list[int]]:
    """Token ids of the prompt with each option, as one text: their border may fall in a token."""
    return [tokenizer.encode(prompt + option) for option in options]
