"""MATH: competition problems in seven subjects (Hendrycks et al. 2021, arXiv:2103.03874)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import DataError
from ...files.rows import Row
from ..data.fields import text
from ..question import Item, Question
from ..scoring.math_answers import boxed, final_answer
from ..scoring.metrics import exact_match
from ..task import CODE, Example, Source, Task

__all__ = ["MATH", "SUBJECTS"]

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def read_row(row: Row) -> Mapping[str, Any]:
    """Problem, worked solution and the inside of its box; some copies have the answer alone."""
    there = {name.lower() for name in row.value}
    solution = text(row, "solution") if "solution" in there else ""
    answer = text(row, "answer") if "answer" in there else boxed(text(row, "solution", "answer"))
    if answer is None:
        raise DataError(
            f"{row.place}: expected \\boxed{{…}} in 'solution', found none; "
            "is this the set's own file?"
        )
    return {"problem": text(row, "problem"), "solution": solution, "answer": answer}


def ask(item: Item) -> Example:
    """The worked solution, where there is one, and the answer in normal form as in the reply."""
    gold = final_answer(item.fields["answer"])
    conclusion = f"\nFinal Answer: The final answer is ${gold}$. I hope it is correct."
    return Example(
        input=f"Problem: {item.fields['problem']}\nSolution: ",
        output=(item.fields["solution"] + conclusion).lstrip("\n"),
        gold=gold,
    )


def answer(reply: str, question: Question) -> str:
    """The reply's conclusion in normal form."""
    return final_answer(reply)


def is_gold(parsed: str, question: Question) -> float:
    """exact_match."""
    return exact_match(parsed, question.gold)


MATH = Task(
    name="math",
    title="MATH",
    language="en",
    shots={"gen": 4},
    source=Source(
        repo="EleutherAI/hendrycks_math",
        download=("{subset}/test/0000.parquet", "{subset}/train/0000.parquet"),
        items=(
            "test/{subset}/*.json",
            "MATH/test/{subset}/*.json",
            "test/{subset}.json*",
            "{subset}/test*.parquet",
            "{subset}/test/*.parquet",
            "math.jsonl",
            "math500.jsonl",
        ),
        shots=(
            "train/{subset}/*.json",
            "MATH/train/{subset}/*.json",
            "train/{subset}.json*",
            "{subset}/train*.parquet",
            "{subset}/train/*.parquet",
            "math_train.jsonl",
        ),
        read=read_row,
        subsets=(*SUBJECTS, ""),
        subset_of="subject",
    ),
    ask=ask,
    settings=CODE,
    read=answer,
    match=is_gold,
)
