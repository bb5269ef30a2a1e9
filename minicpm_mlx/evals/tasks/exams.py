"""Questions with lettered options, as most sets ask them: in Chinese and in English."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...files.rows import Row
from ..data.fields import (
    LETTERS,
    answer_place,
    four_options,
    text,
)
from ..question import Item, Question
from ..scoring.metrics import prefix_match
from ..task import Example

__all__ = [
    "REQUIREMENT",
    "ask_chinese",
    "ask_english",
    "begins_with_gold",
    "lettered",
    "read_four",
]

REQUIREMENT = (
    "Requirement:\n"
    "Choose and respond with the letter of the correct answer, including the parentheses.\n"
)


def read_four(row: Row) -> Mapping[str, Any] | None:
    """Question, four distinct options and the place of the right one; None without those four."""
    options = four_options(row)
    if len(set(options)) != 4:
        return None
    return {
        "question": text(row, "question"),
        "choices": options,
        "answer": answer_place(row, "answer", 4),
    }


def lettered(options: Sequence[str]) -> str:
    """One option a line, each line ended: "(A) …"."""
    return "".join(
        f"({letter}) {option}\n" for letter, option in zip(LETTERS, options, strict=False)
    )


def ask_chinese(item: Item) -> Example:
    """The template of C-Eval and CMMLU."""
    prompt = (
        f"问题：\n{item.fields['question']}\n"
        "要求：\n从以下选项中选择并回答正确答案的选项字母，包括左右括号。\n"
        f"选项：\n{lettered(item.fields['choices'])}答案：\n"
    )
    return _answered(prompt, item)


def ask_english(item: Item) -> Example:
    """The template of MMLU and ARC."""
    prompt = (
        f"Question:\n{item.fields['question']}\n{REQUIREMENT}"
        f"Options:\n{lettered(item.fields['choices'])}Answer:\n"
    )
    return _answered(prompt, item)


def begins_with_gold(parsed: str, question: Question) -> float:
    """prefix_match."""
    return prefix_match(parsed, question.gold)


def _answered(prompt: str, item: Item) -> Example:
    gold = f"({LETTERS[item.fields['answer']]})"
    return Example(input=prompt, output=gold, gold=gold)
