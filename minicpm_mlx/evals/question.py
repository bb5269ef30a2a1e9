"""What is asked: an item as the data has it, and the question that a model reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Item", "Question"]


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question of a set."""

    id: str
    """Unique within its subset, from the data or its place there: the same in every run."""
    subset: str
    """Subject (MMLU, C-Eval, CMMLU, MATH) or task (BBH); "" where a set has none."""
    fields: Mapping[str, Any]
    """The parts that its task asks for: question, choices, answer, …"""


@dataclass(frozen=True, kw_only=True)
class Question:
    """An item as the model is asked it."""

    item: Item
    prompt: str
    """The whole text: description, examples, input."""
    gold: str
    """What a right reply is compared with: "(B)", a number, code."""
    options: tuple[str, ...] = ()
    """ppl: continuations of the prompt, in the data's order."""
    right: int | None = None
    """ppl: which of the options is right."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply; UltraEval has none."""
