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
    """For each prompt and each of its options, the log probabilities of all tokens of both.

    Prompt and option are encoded as one text; its first token, which has no probability, is left
    out. ContextLengthError for a text longer than the model's context.

        loglikelihoods(lm, ["1 + 1 = "], [["2", "3"]])
    """
    if len(prompts) != len(options):
        raise InvalidArgumentError(
            f"expected options for each of {len(prompts)} prompts, got {len(options)} lists"
        )
    groups = (
        Alternatives(encode_options(lm.tokenizer, prompt, texts))
        for prompt, texts in zip(prompts, options, strict=True)
    )
    results = dict(score(lm.model, groups, context=lm.context_length))
    return [[scores.logprobs for scores in results[index]] for index in range(len(prompts))]


def encode_options(tokenizer: Tokenizer, prompt: str, options: Sequence[str]) -> list[list[int]]:
    """Token ids of the prompt with each option, as one text: a token may span their border."""
    return [tokenizer.encode(prompt + option) for option in options]
