"""GSM8K: sums in words, solved in steps (Cobbe et al. 2021, arXiv:2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import DataError
from ...files.rows import Row
from ..data.fields import text
from ..question import Item, Question
from ..scoring.early_stop import after_number
from ..scoring.metrics import exact_match
from ..scoring.parsing import grade_school_number
from ..task import CODE, Example, Source, Task

__all__ = ["GSM8K"]


def read_row(row: Row) -> Mapping[str, Any]:
    """Question and worked solution, which ends with its number."""
    solution = text(row, "answer")
    if not re.search(r"####.*\d", solution):
        raise DataError(
            f"{row.place}: expected a solution that ends with #### and its number, found "
            f"{solution[-40:]!r}; is this the set's own file?"
        )
    return {"question": text(row, "question"), "answer": solution}


def ask(item: Item) -> Example:
    """The whole solution stands in an example; its number is compared."""
    solution = item.fields["answer"]
    return Example(
        input=f"Question: {item.fields['question']}\nAnswer: ",
        output=solution,
        gold=grade_school_number(solution),
    )


def number(reply: str, question: Question) -> str:
    """The number a reply arrives at."""
    return grade_school_number(reply)


def is_gold(parsed: str, question: Question) -> float:
    """exact_match."""
    return exact_match(parsed, question.gold)


GSM8K = Task(
    name="gsm8k",
    title="GSM8K",
    language="en",
    shots={"gen": 8},
    source=Source(
        repo="openai/gsm8k",
        download=("main/test/0000.parquet", "main/train/0000.parquet"),
        items=(
            "grade_school_math/data/test.jsonl",
            "gsm8k.jsonl",
            "main/test*.parquet",
            "main/test/*.parquet",
            "test.jsonl",
        ),
        shots=(
            "grade_school_math/data/train.jsonl",
            "gsm8k_train.jsonl",
            "main/train*.parquet",
            "main/train/*.parquet",
            "train.jsonl",
        ),
        read=read_row,
    ),
    ask=ask,
    settings=CODE,
    read=number,
    match=is_gold,
    enough=after_number,
)
