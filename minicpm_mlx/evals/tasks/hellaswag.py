"""HellaSwag: which ending makes sense (Zellers et al. 2019, arXiv:1905.07830), validation split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...files.rows import Row
from ..data.fields import answer_index, text, texts
from ..question import Doc
from ..scoring.metrics import mean_loss_past_prefix
from ..task import DocText, MultipleChoice, Source, Task
from .exams import REQUIREMENT, by_letter_or_text, lettered, with_letter


def _parse_row(row: Row) -> Mapping[str, Any]:
    endings = texts(row, "endings")
    return {
        "context": f"{text(row, 'activity_label')}: {text(row, 'ctx')}",
        "choices": endings,
        "answer": answer_index(row, "label", len(endings)),
    }


def _format_doc(doc: Doc) -> DocText:
    # The space before the context is UltraEval's.
    prompt = (
        f"Context:\n {doc.fields['context']}\nQuestion:\nWhich ending makes the most sense?\n"
        f"{REQUIREMENT}Options:\n{lettered(doc.fields['choices'])}Answer:\n"
    )
    return with_letter(prompt, doc)


def _multiple_choice(doc: Doc) -> MultipleChoice:
    fields = doc.fields
    prompt = f"{fields['context']} "
    return MultipleChoice(prompt=prompt, options=tuple(fields["choices"]), right=fields["answer"])


HELLASWAG = Task(
    name="hellaswag",
    title="HellaSwag",
    language="en",
    few_shot={"gen": 0, "ppl": 0},
    source=Source(
        repo="Rowan/hellaswag",
        download=("default/validation/0000.parquet",),
        questions=(
            "hellaswag_val.jsonl",
            "data/hellaswag_val.jsonl",
            "data/validation*.parquet",
            "default/validation/*.parquet",
            "hellaswag.jsonl",
        ),
        parse_row=_parse_row,
        id_field="ind",
    ),
    format_doc=_format_doc,
    **by_letter_or_text("context"),
    multiple_choice=_multiple_choice,
    loss=mean_loss_past_prefix,
)
