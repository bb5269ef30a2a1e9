"""MBPP, sanitized: 427 small functions with tests (Austin et al. 2021, arXiv:2108.07732); pass@1.

All 427 problems are asked, as in the published table: those of the original's training and prompt
splits too. Its problems 2 to 10 are meant as examples and are the examples here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...files.rows import Row
from ..data.fields import text, texts, value
from ..question import Item, Question
from ..scoring.parsing import mbpp_code
from ..task import CODE, Example, Source, Task

__all__ = ["MBPP"]


def read_row(row: Row) -> Mapping[str, Any]:
    """Problem, solution and tests; imports and set-up where the layout has them."""
    there = {name.lower() for name in row.value}
    number = value(row, "task_id")
    return {
        "task_id": number,
        "text": text(row, "prompt", "text"),
        "code": text(row, "code"),
        "test_list": texts(row, "test_list"),
        "test_imports": texts(row, "test_imports") if "test_imports" in there else [],
        "test_setup_code": text(row, "test_setup_code") if "test_setup_code" in there else "",
    }


def is_example(fields: Mapping[str, Any]) -> bool:
    """Whether the set means a problem as an example."""
    return int(fields["task_id"]) <= 10


def ask(item: Item) -> Example:
    """Problem and tests as a docstring."""
    tests = "\n".join(item.fields["test_list"])
    docstring = f'"""{item.fields["text"]}\n{tests}"""'
    return Example(input=docstring, output=item.fields["code"], gold=item.fields["code"])


def program(reply: str, question: Question) -> str:
    """The docstring, the reply without the next problem, the tests with what they import.

    A docstring that ends in a quote of its last test, as one in a hundred does, is no Python: it is
    left out. UltraEval kept it, so that no reply could pass.
    """
    fields = question.item.fields
    docstring = ask(question.item).input
    inside = docstring[3:-3]
    lines = [] if '"""' in inside or inside.endswith(('"', "\\")) else [docstring]
    setup = [*fields["test_imports"], fields["test_setup_code"]]
    return "\n".join([*lines, mbpp_code(reply), *filter(None, setup), *fields["test_list"]])


MBPP = Task(
    name="mbpp",
    title="MBPP",
    language="en",
    shots={"gen": 3},
    source=Source(
        repo="google-research-datasets/mbpp",
        download=tuple(
            f"sanitized/{split}/0000.parquet" for split in ("train", "test", "validation", "prompt")
        ),
        items=(
            "sanitized-mbpp.json",
            "mbpp/sanitized-mbpp.json",
            "sanitized/*.parquet",
            "sanitized/*/*.parquet",
            "mbpp.jsonl",
        ),
        shots=(
            "sanitized-mbpp.json",
            "mbpp/sanitized-mbpp.json",
            "sanitized/prompt*.parquet",
            "sanitized/prompt/*.parquet",
            "mbpp_fewshot.jsonl",
        ),
        read=read_row,
        shot=is_example,
        name_of="task_id",
    ),
    ask=ask,
    settings=CODE,
    read=program,
)
