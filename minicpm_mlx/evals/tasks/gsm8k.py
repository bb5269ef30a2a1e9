"""GSM8K: sums in words, solved in steps (Cobbe et al. 2021, arXiv:2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import DataError
from ...files.rows import Row
from ..data.fields import text
from ..question import Doc
from ..scoring.early_stop import after_number
from ..scoring.metrics import exact_match
from ..scoring.parsing import grade_school_number
from ..task import CODE_SAMPLING, DocText, Source, Task, parquet_files


def _parse_row(row: Row) -> Mapping[str, Any]:
    solution = text(row, "answer")
    if not re.search(r"####.*\d", solution):
        raise DataError(
            f"{row.place}: expected a solution that ends with #### and its number, found "
            f"{solution[-40:]!r}; is this the set's own file?"
        )
    return {"question": text(row, "question"), "answer": solution}


def _format_doc(doc: Doc) -> DocText:
    solution = doc.fields["answer"]
    return DocText(
        input=f"Question: {doc.fields['question']}\nAnswer: ",
        output=solution,
        gold=grade_school_number(solution),
    )


GSM8K = Task(
    name="gsm8k",
    title="GSM8K",
    language="en",
    few_shot={"gen": 8},
    source=Source(
        repo="openai/gsm8k",
        download=("main/test/0000.parquet", "main/train/0000.parquet"),
        questions=(
            "grade_school_math/data/test.jsonl",
            "gsm8k.jsonl",
            *parquet_files("main/test"),
            "test.jsonl",
        ),
        examples=(
            "grade_school_math/data/train.jsonl",
            "gsm8k_train.jsonl",
            *parquet_files("main/train"),
            "train.jsonl",
        ),
        parse_row=_parse_row,
    ),
    format_doc=_format_doc,
    sampling=CODE_SAMPLING,
    postprocess=lambda reply, question: grade_school_number(reply),
    metric=lambda parsed, question: exact_match(parsed, question.gold),
    early_stop=after_number,
)
