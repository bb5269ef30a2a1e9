"""HumanEval: 164 functions to complete (Chen et al. 2021, arXiv:2107.03374); pass@1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...files.rows import Row
from ..data.fields import text
from ..question import Item, Question
from ..scoring.early_stop import after_body
from ..scoring.parsing import humaneval_body
from ..task import CODE, Example, Source, Task

__all__ = ["HUMANEVAL"]


def read_row(row: Row) -> Mapping[str, Any]:
    """What the model completes, and what checks it."""
    names = ("prompt", "entry_point", "canonical_solution", "test")
    return {name: text(row, name) for name in names}


def ask(item: Item) -> Example:
    """The function's beginning, without the newline that ends it."""
    solution = item.fields["canonical_solution"]
    return Example(input=item.fields["prompt"].strip(), output="\n" + solution, gold=solution)


def program(reply: str, question: Question) -> str:
    """The function's beginning with its newline, the reply up to where it leaves it, the checks.

    So both a reply that goes on at the end of the prompt and one that starts a line fit.
    """
    fields = question.item.fields
    body = fields["prompt"] + humaneval_body(reply)
    return f"{body}\n{fields['test']}\ncheck({fields['entry_point']})"


HUMANEVAL = Task(
    name="humaneval",
    title="HumanEval",
    language="en",
    shots={"gen": 0},
    source=Source(
        repo="openai/openai_humaneval",
        download=("openai_humaneval/test/0000.parquet",),
        items=(
            "HumanEval.jsonl.gz",
            "data/HumanEval.jsonl.gz",
            "HumanEval.jsonl",
            "openai_humaneval/test*.parquet",
            "openai_humaneval/test/*.parquet",
            "humaneval.jsonl",
        ),
        read=read_row,
        name_of="task_id",
    ),
    ask=ask,
    settings=CODE,
    read=program,
    enough=after_body,
)
