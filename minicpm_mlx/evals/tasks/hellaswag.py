"""HellaSwag: which ending makes sense (Zellers et al. 2019, arXiv:1905.07830), validation split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...files.rows import Row
from ..data.fields import (
    LETTERS,
    answer_place,
    text,
    texts,
)
from ..question import Item, Question
from ..scoring.early_stop import after_name
from ..scoring.metrics import mean_loss_past_prefix, qa_match
from ..task import Choice, Example, Source, Task
from .exams import REQUIREMENT, lettered

__all__ = ["HELLASWAG"]


def read_row(row: Row) -> Mapping[str, Any]:
    """What happens, its endings and the place of the real one."""
    endings = texts(row, "endings")
    return {
        "context": f"{text(row, 'activity_label')}: {text(row, 'ctx')}",
        "choices": endings,
        "answer": answer_place(row, "label", len(endings)),
    }


def ask(item: Item) -> Example:
    """The context begins with a space, as it was."""
    prompt = (
        f"Context:\n {item.fields['context']}\nQuestion:\nWhich ending makes the most sense?\n"
        f"{REQUIREMENT}Options:\n{lettered(item.fields['choices'])}Answer:\n"
    )
    gold = f"({LETTERS[item.fields['answer']]})"
    return Example(input=prompt, output=gold, gold=gold)


def choice(item: Item) -> Choice:
    """The endings after the context."""
    fields = item.fields
    prompt = f"{fields['context']} "
    return Choice(prompt=prompt, options=tuple(fields["choices"]), right=fields["answer"])


def names_gold(parsed: str, question: Question) -> float:
    """qa_match, where the context is what may be repeated."""
    fields = question.item.fields
    right = fields["choices"][fields["answer"]]
    return qa_match(parsed, question.gold, right, fields["context"])


def is_named(reply: str, question: Question) -> bool:
    """Whether more of the reply could not change what it names."""
    fields = question.item.fields
    return after_name(reply, question, fields["choices"][fields["answer"]], fields["context"])


HELLASWAG = Task(
    name="hellaswag",
    title="HellaSwag",
    language="en",
    shots={"gen": 0, "ppl": 0},
    source=Source(
        repo="Rowan/hellaswag",
        download=("default/validation/0000.parquet",),
        items=(
            "hellaswag_val.jsonl",
            "data/hellaswag_val.jsonl",
            "data/validation*.parquet",
            "default/validation/*.parquet",
            "hellaswag.jsonl",
        ),
        read=read_row,
        name_of="ind",
    ),
    ask=ask,
    match=names_gold,
    enough=is_named,
    choice=choice,
    loss=mean_loss_past_prefix,
)
