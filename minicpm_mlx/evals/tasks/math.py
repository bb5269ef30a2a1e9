"""MATH: competition problems in seven subjects (Hendrycks et al. 2021, arXiv:2103.03874)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import DataError
from ...files.rows import Row
from ..data.fields import text
from ..question import Doc
from ..scoring.math_answers import boxed, final_answer
from ..scoring.metrics import exact_match
from ..task import CODE_SAMPLING, DocText, Source, Task, parquet_files

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def _parse_row(row: Row) -> Mapping[str, Any]:
    """Problem, solution and answer; some copies have the answer without a solution."""
    names = {name.lower() for name in row.value}
    solution = text(row, "solution") if "solution" in names else ""
    answer = text(row, "answer") if "answer" in names else boxed(text(row, "solution", "answer"))
    if answer is None:
        raise DataError(
            f"{row.place}: expected \\boxed{{…}} in 'solution', found none; "
            "is this the set's own file?"
        )
    return {"problem": text(row, "problem"), "solution": solution, "answer": answer}


def _format_doc(doc: Doc) -> DocText:
    """The answer is brought to the normal form of the replies' answers."""
    gold = final_answer(doc.fields["answer"])
    conclusion = f"\nFinal Answer: The final answer is ${gold}$. I hope it is correct."
    return DocText(
        input=f"Problem: {doc.fields['problem']}\nSolution: ",
        output=(doc.fields["solution"] + conclusion).lstrip("\n"),
        gold=gold,
    )


MATH = Task(
    name="math",
    title="MATH",
    language="en",
    few_shot={"gen": 4},
    source=Source(
        repo="EleutherAI/hendrycks_math",
        download=("{subset}/test/0000.parquet", "{subset}/train/0000.parquet"),
        questions=(
            "test/{subset}/*.json",
            "MATH/test/{subset}/*.json",
            "test/{subset}.json*",
            *parquet_files("{subset}/test"),
            "math.jsonl",
            "math500.jsonl",
        ),
        examples=(
            "train/{subset}/*.json",
            "MATH/train/{subset}/*.json",
            "train/{subset}.json*",
            *parquet_files("{subset}/train"),
            "math_train.jsonl",
        ),
        parse_row=_parse_row,
        subsets=(*SUBJECTS, ""),
        subset_field="subject",
    ),
    format_doc=_format_doc,
    sampling=CODE_SAMPLING,
    postprocess=lambda reply, question: final_answer(reply),
    metric=lambda parsed, question: exact_match(parsed, question.gold),
)
