"""ARC: school science, easy and challenging (Clark et al. 2018, arXiv:1803.05457)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...files.rows import Row
from ..data.fields import text, value, wrong
from ..question import Item, Question
from ..scoring.early_stop import after_name
from ..scoring.metrics import qa_match
from ..task import Choice, Source, Task
from .exams import ask_english

__all__ = ["ARC_CHALLENGE", "ARC_EASY"]


def read_row(row: Row) -> Mapping[str, Any]:
    """Question, three to five options and the place of the right one.

    The authors' layout has the options inside the question, the hub's beside it; labels are letters
    or numbers, whichever the examination had.
    """
    stem = value(row, "question")
    if isinstance(stem, dict):
        row = Row(row.place, {**row.value, "question": stem.get("stem"), **_inside(stem)})
    choices = value(row, "choices")
    if not isinstance(choices, dict):
        raise wrong(row, "choices", "options with 'text' and 'label'", choices)
    inner = Row(row.place, choices)
    options, labels = list(value(inner, "text")), list(value(inner, "label"))
    key = text(row, "answerKey")
    if key not in labels or len(options) != len(labels):
        raise wrong(row, "answerKey", f"one of {', '.join(map(str, labels))}", key)
    return {"question": text(row, "question"), "choices": options, "answer": labels.index(key)}


def _inside(question: Mapping[str, Any]) -> Mapping[str, Any]:
    listed = question.get("choices")
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        return {}
    columns = ("text", "label")
    return {"choices": {name: [each.get(name) for each in listed] for name in columns}}


def choice(item: Item) -> Choice:
    """The options' texts after the question."""
    fields = item.fields
    prompt = f"Question: {fields['question']}\nAnswer: "
    return Choice(prompt=prompt, options=tuple(fields["choices"]), right=fields["answer"])


def names_gold(parsed: str, question: Question) -> float:
    """qa_match."""
    fields = question.item.fields
    right = fields["choices"][fields["answer"]]
    return qa_match(parsed, question.gold, right, fields["question"])


def is_named(reply: str, question: Question) -> bool:
    """Whether more of the reply could not change what it names."""
    fields = question.item.fields
    return after_name(reply, question, fields["choices"][fields["answer"]], fields["question"])


def _arc(name: str, title: str, part: str) -> Task:
    return Task(
        name=name,
        title=title,
        language="en",
        shots={"gen": 0, "ppl": 0},
        source=Source(
            repo="allenai/ai2_arc",
            download=(f"{part}/test/0000.parquet",),
            items=(
                f"{part}/{part}-Test.jsonl",
                f"ARC-V1-Feb2018-2/{part}/{part}-Test.jsonl",
                f"{part}-Test.jsonl",
                f"{part}/test*.parquet",
                f"{part}/test/*.parquet",
                f"{name}.jsonl",
            ),
            read=read_row,
            name_of="id",
        ),
        ask=ask_english,
        match=names_gold,
        enough=is_named,
        choice=choice,
    )


ARC_EASY = _arc("arc_easy", "ARC-E", "ARC-Easy")
ARC_CHALLENGE = _arc("arc_challenge", "ARC-C", "ARC-Challenge")
