"""HumanEval: 164 functions to complete (Chen et al. 2021, arXiv:2107.03374); pass@1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...files.rows import Row
from ..data.fields import text
from ..question import Doc, Question
from ..scoring.early_stop import after_body
from ..scoring.parsing import humaneval_body
from ..task import CODE_SAMPLING, DocText, Source, Task, parquet_files


def _parse_row(row: Row) -> Mapping[str, Any]:
    names = ("prompt", "entry_point", "canonical_solution", "test")
    return {name: text(row, name) for name in names}


def _format_doc(doc: Doc) -> DocText:
    # Without the newline that ends the prompt, as in UltraEval.
    solution = doc.fields["canonical_solution"]
    return DocText(input=doc.fields["prompt"].strip(), output="\n" + solution, gold=solution)


def _program(reply: str, question: Question) -> str:
    """The prompt with its newline, the body from the reply, and the checks.

    A reply that continues the prompt's last line fits, and one that starts a new line.
    """
    fields = question.doc.fields
    body = fields["prompt"] + humaneval_body(reply)
    return f"{body}\n{fields['test']}\ncheck({fields['entry_point']})"


HUMANEVAL = Task(
    name="humaneval",
    title="HumanEval",
    language="en",
    few_shot={"gen": 0},
    source=Source(
        repo="openai/openai_humaneval",
        download=("openai_humaneval/test/0000.parquet",),
        questions=(
            "HumanEval.jsonl.gz",
            "data/HumanEval.jsonl.gz",
            "HumanEval.jsonl",
            *parquet_files("openai_humaneval/test"),
            "humaneval.jsonl",
        ),
        parse_row=_parse_row,
        id_field="task_id",
    ),
    format_doc=_format_doc,
    sampling=CODE_SAMPLING,
    postprocess=_program,
    early_stop=after_body,
)
