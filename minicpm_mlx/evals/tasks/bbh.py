"""BBH: 27 hard tasks of BIG-Bench (Suzgun et al. 2022, arXiv:2210.09261), asked directly.

As in UltraEval, tasks with few answers become questions with lettered options, after the options
that the input itself may list. It gave sports_understanding, whose answers are written in small
letters, a third option equal to the answer; here there are two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...errors import DataError
from ...files.rows import Row
from ..data.fields import LETTERS, text
from ..question import Item, Question
from ..scoring.early_stop import after_paragraph, as_long_as_gold
from ..scoring.metrics import exact_match, prefix_match
from ..scoring.parsing import bbh_answer
from ..task import Example, Source, Task
from .exams import REQUIREMENT, lettered

__all__ = ["BBH", "SUBSETS", "read_row"]

FREE = ("dyck_languages", "multistep_arithmetic_two", "object_counting", "word_sorting")
"""Tasks without options."""

TWO = {
    "boolean_expressions": ("True", "False"),
    "causal_judgement": ("Yes", "No"),
    "formal_fallacies": ("valid", "invalid"),
    "navigate": ("Yes", "No"),
    "sports_understanding": ("Yes", "No"),
    "web_of_lies": ("Yes", "No"),
}
"""Options of tasks that have the same two throughout."""

SUBSETS = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)

MISTAKEN = {
    "Monsters, Inc": "(A)",  # movie_recommendation
    "dearth, wind, & fire": "",  # ruin_names, twice: no option can be told
    "rita, sue and bob poo": "",
}
"""Answers that are no letter where all others are, and what UltraEval made of them."""

_OPTION = re.compile(r"^\(([A-Z])\) (.*)$", re.MULTILINE)


def read_row(row: Row) -> Mapping[str, Any]:
    """Input and target."""
    return {"input": text(row, "input"), "target": text(row, "target").strip()}


def read_asked(row: Row) -> Mapping[str, Any] | None:
    """The same, less the rows whose target is none of their options."""
    fields = read_row(row)
    return None if MISTAKEN.get(fields["target"]) == "" else fields


def options(item: Item) -> tuple[str, ...]:
    """The options of an item, in order."""
    if item.subset in TWO:
        return TWO[item.subset]
    return tuple(option.strip() for _, option in _OPTION.findall(item.fields["input"]))


def letter(item: Item) -> str:
    """The right option's, "(B)"."""
    target = MISTAKEN.get(item.fields["target"], item.fields["target"])
    if item.subset in TWO:
        names = [option.lower() for option in TWO[item.subset]]
        place = names.index(target.lower()) if target.lower() in names else -1
    else:
        place = LETTERS.find(target[1]) if re.fullmatch(r"\([A-Z]\)", target) else -1
    if not 0 <= place < len(options(item)):
        raise DataError(
            f"{item.subset} {item.id}: expected one of {list(options(item))} as target, "
            f"found {target[:40]!r}; is this the set's own file?"
        )
    return f"({LETTERS[place]})"


def ask(item: Item) -> Example:
    """Input and answer, or input, options and letter."""
    question = f"Question:\n{item.fields['input']}\n"
    if item.subset in FREE:
        target = item.fields["target"]
        return Example(input=f"{question}Answer:\n", output=target, gold=target)
    listed = f"{REQUIREMENT}Options:\n{lettered(options(item))}"
    gold = letter(item)
    return Example(input=f"{question}{listed}Answer:\n", output=gold, gold=gold)


def answer(reply: str, question: Question) -> str:
    """What is announced as the answer, where there are no options; else the reply."""
    return bbh_answer(reply) if question.item.subset in FREE else reply


def is_gold(parsed: str, question: Question) -> float:
    """exact_match without options, else prefix_match."""
    metric = exact_match if question.item.subset in FREE else prefix_match
    return metric(parsed, question.gold)


def is_decided(reply: str, question: Question) -> bool:
    """Whether more of the reply could not change its score."""
    decided = after_paragraph if question.item.subset in FREE else as_long_as_gold
    return decided(reply, question)


BBH = Task(
    name="bbh",
    title="BBH",
    language="en",
    shots={"gen": 3},
    source=Source(
        repo="lukaemon/bbh",
        download=("{subset}/test/0000.parquet",),
        items=(
            "bbh/{subset}.json",
            "{subset}.json",
            "{subset}/test*.parquet",
            "{subset}/test/*.parquet",
            "bbh.jsonl",
        ),
        read=read_asked,
        subsets=SUBSETS,
        subset_of="task",
        name_of="index",
    ),
    ask=ask,
    read=answer,
    match=is_gold,
    enough=is_decided,
)
