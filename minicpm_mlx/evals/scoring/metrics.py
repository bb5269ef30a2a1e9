"""UltraEval's metrics: score an extracted answer, and choose an option by log probabilities."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from itertools import takewhile


def prefix_match(reply: str, gold: str) -> float:
    """Whether the reply begins with the answer; full-width brackets （B） are not (B)."""
    return float(reply.strip().startswith(gold.strip()))


def exact_match(reply: str, gold: str) -> float:
    """Whether reply and answer are equal, spaces aside; an empty reply is wrong."""
    text = reply.strip().replace(" ", "")
    return float(bool(text) and text == gold.strip().replace(" ", ""))


def in_match(reply: str, answers: Collection[str]) -> float:
    """Whether the reply is one of the answers, in any case."""
    return float(reply.strip().lower() in {answer.strip().lower() for answer in answers})


def qa_match(reply: str, gold: str, answer: str, question: str) -> float:
    """Whether the reply names the letter of `gold`, "(B)", or begins with the option's text.

    The letter must be the first word of the first line, in parentheses or bare. A repetition of the
    question is removed before the text is compared.
    """
    text = reply.strip()
    word = text.split("\n")[0].split(" ")[0].rstrip(".")
    if word in (gold, gold.strip("()")):
        return 1.0
    text = text.removeprefix(question.strip()).strip()
    answer = answer.strip()
    return float(bool(answer) and text.startswith(answer))


def total_loss(logprobs: Sequence[Sequence[float]]) -> list[float]:
    """The negative sum of each option's log probabilities, not normalised by length."""
    return [_finite(-sum(option)) for option in logprobs]


def mean_loss_past_prefix(logprobs: Sequence[Sequence[float]]) -> list[float]:
    """Each option's negative mean log probability, without leading tokens equal for all options.

    An option without any other token counts as infinitely unlikely.
    """
    same = takewhile(lambda column: len(set(column)) == 1, zip(*logprobs, strict=False))
    start = sum(1 for _ in same)
    rests = [option[start:] for option in logprobs]
    return [_finite(-sum(rest) / len(rest)) if rest else math.inf for rest in rests]


def smallest(losses: Sequence[float]) -> int:
    """Index of the smallest loss; the first of equal ones."""
    return min(range(len(losses)), key=losses.__getitem__)


def _finite(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
