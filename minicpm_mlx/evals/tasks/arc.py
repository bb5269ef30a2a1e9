"""ARC: school science, easy and challenging (Clark et al. 2018, arXiv:1803.05457)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...files.rows import Row
from ..data.fields import text, value, wrong
from ..question import Doc
from ..task import MultipleChoice, Source, Task, parquet_files
from .exams import by_letter_or_text, format_english


def _parse_row(row: Row) -> Mapping[str, Any]:
    """Question, three to five options and the index of the correct one.

    The authors' layout has the options inside the question, the hub's beside it. Labels are
    letters or numbers, as in the exam.
    """
    stem = value(row, "question")
    if isinstance(stem, dict):
        row = Row(row.place, {**row.value, "question": stem.get("stem"), **_nested_choices(stem)})
    choices = value(row, "choices")
    if not isinstance(choices, dict):
        raise wrong(row, "choices", "options with 'text' and 'label'", choices)
    columns = Row(row.place, choices)
    options, labels = list(value(columns, "text")), list(value(columns, "label"))
    key = text(row, "answerKey")
    if key not in labels or len(options) != len(labels):
        raise wrong(row, "answerKey", f"one of {', '.join(map(str, labels))}", key)
    return {"question": text(row, "question"), "choices": options, "answer": labels.index(key)}


def _nested_choices(question: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = question.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        return {}
    names = ("text", "label")
    return {"choices": {name: [choice.get(name) for choice in choices] for name in names}}


def _multiple_choice(doc: Doc) -> MultipleChoice:
    fields = doc.fields
    prompt = f"Question: {fields['question']}\nAnswer: "
    return MultipleChoice(prompt=prompt, options=tuple(fields["choices"]), right=fields["answer"])


def _arc(name: str, title: str, folder: str) -> Task:
    return Task(
        name=name,
        title=title,
        language="en",
        few_shot={"gen": 0, "ppl": 0},
        source=Source(
            repo="allenai/ai2_arc",
            download=(f"{folder}/test/0000.parquet",),
            questions=(
                f"{folder}/{folder}-Test.jsonl",
                f"ARC-V1-Feb2018-2/{folder}/{folder}-Test.jsonl",
                f"{folder}-Test.jsonl",
                *parquet_files(f"{folder}/test"),
                f"{name}.jsonl",
            ),
            parse_row=_parse_row,
            id_field="id",
        ),
        format_doc=format_english,
        multiple_choice=_multiple_choice,
        **by_letter_or_text("question"),
    )


ARC_EASY = _arc("arc_easy", "ARC-E", "ARC-Easy")
ARC_CHALLENGE = _arc("arc_challenge", "ARC-C", "ARC-Challenge")
