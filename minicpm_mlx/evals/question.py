"""A data set's document, and the question made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Doc:
    """One document of a data set, as its file has it."""

    id: str
    """Unique within the subset and the same in every run: from the data, or its index there."""
    subset: str
    """Subject (MMLU, C-Eval, CMMLU, MATH) or task (BBH); "" where a set has none."""
    fields: Mapping[str, Any]
    """The fields its task reads: question, choices, answer, …"""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A document as the model is asked it."""

    doc: Doc
    prompt: str
    """The whole text: description, examples, input."""
    gold: str
    """The answer a correct reply is compared with: "(B)", a number, code."""
    options: tuple[str, ...] = ()
    """ppl: continuations of the prompt, in the data's order."""
    right: int | None = None
    """ppl: index of the correct option."""
    stop: tuple[str, ...] = ()
    """Stop strings of the reply; UltraEval has none."""
