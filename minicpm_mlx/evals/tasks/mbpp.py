"""MBPP, sanitized: 427 small functions with tests (Austin et al. 2021, arXiv:2108.07732); pass@1.

All 427 problems are asked, as in the published table, those of the training and prompt splits
included. Problems 2 to 10 are the examples, as the set intends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...files.rows import Row
from ..data.fields import text, texts, value
from ..question import Doc, Question
from ..scoring.parsing import mbpp_code
from ..task import CODE_SAMPLING, DocText, Source, Task, parquet_files


def _parse_row(row: Row) -> Mapping[str, Any]:
    """Problem, solution and tests; some layouts have imports and set-up code."""
    names = {name.lower() for name in row.value}
    return {
        "task_id": value(row, "task_id"),
        "text": text(row, "prompt", "text"),
        "code": text(row, "code"),
        "test_list": texts(row, "test_list"),
        "test_imports": texts(row, "test_imports") if "test_imports" in names else [],
        "test_setup_code": text(row, "test_setup_code") if "test_setup_code" in names else "",
    }


def _format_doc(doc: Doc) -> DocText:
    tests = "\n".join(doc.fields["test_list"])
    docstring = f'"""{doc.fields["text"]}\n{tests}"""'
    return DocText(input=docstring, output=doc.fields["code"], gold=doc.fields["code"])


def _program(reply: str, question: Question) -> str:
    """The docstring, the reply's code, and the tests with their imports.

    About one docstring in a hundred ends in a quote of its last test, which is no valid Python; it
    is left out. UltraEval kept it, so that no reply could pass.
    """
    fields = question.doc.fields
    docstring = _format_doc(question.doc).input
    inside = docstring[3:-3]
    lines = [] if '"""' in inside or inside.endswith(('"', "\\")) else [docstring]
    setup = [*fields["test_imports"], fields["test_setup_code"]]
    return "\n".join([*lines, mbpp_code(reply), *filter(None, setup), *fields["test_list"]])


MBPP = Task(
    name="mbpp",
    title="MBPP",
    language="en",
    few_shot={"gen": 3},
    source=Source(
        repo="google-research-datasets/mbpp",
        download=tuple(
            f"sanitized/{split}/0000.parquet" for split in ("train", "test", "validation", "prompt")
        ),
        questions=(
            "sanitized-mbpp.json",
            "mbpp/sanitized-mbpp.json",
            "sanitized/*.parquet",
            "sanitized/*/*.parquet",
            "mbpp.jsonl",
        ),
        examples=(
            "sanitized-mbpp.json",
            "mbpp/sanitized-mbpp.json",
            *parquet_files("sanitized/prompt"),
            "mbpp_fewshot.jsonl",
        ),
        parse_row=_parse_row,
        is_example=lambda fields: int(fields["task_id"]) <= 10,
        id_field="task_id",
    ),
    format_doc=_format_doc,
    sampling=CODE_SAMPLING,
    postprocess=_program,
)
