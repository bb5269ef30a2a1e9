"""BBH: 27 hard tasks of BIG-Bench (Suzgun et al. 2022, arXiv:2210.09261).

BBH is asked directly. As in UltraEval, tasks with few answers become questions with lettered
options, after any options that the input itself lists. UltraEval gave sports_understanding, whose
answers are in lower case, a third option equal to the answer; here it has two.

BBH_COT is asked with a chain of thought, after the three worked examples that the set has for
each task.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...errors import DataError
from ...files.rows import Row
from ..data.fields import LETTERS, text
from ..question import Doc, Question
from ..scoring.early_stop import after_paragraph, as_long_as_gold
from ..scoring.metrics import exact_match, in_match, prefix_match
from ..scoring.parsing import bbh_answer
from ..task import DocText, Source, Task, parquet_files
from .exams import REQUIREMENT, SUBJECTS, lettered

FREE_FORM = ("dyck_languages", "multistep_arithmetic_two", "object_counting", "word_sorting")
"""Tasks without options."""

FIXED_OPTIONS = {
    "boolean_expressions": ("True", "False"),
    "causal_judgement": ("Yes", "No"),
    "formal_fallacies": ("valid", "invalid"),
    "navigate": ("Yes", "No"),
    "sports_understanding": ("Yes", "No"),
    "web_of_lies": ("Yes", "No"),
}
"""Options of tasks that have the same two in every row."""

MISTAKEN_TARGETS = {
    "Monsters, Inc": "(A)",  # movie_recommendation
    "dearth, wind, & fire": "",  # ruin_names, twice: no option can be told
    "rita, sue and bob poo": "",
}
"""Targets that should be a letter and are not, with UltraEval's reading of them; "": dropped."""

_OPTION = re.compile(r"^\(([A-Z])\) (.*)$", re.MULTILINE)


def _parse_any_row(row: Row) -> Mapping[str, Any]:
    return {"input": text(row, "input"), "target": text(row, "target").strip()}


def _parse_row(row: Row) -> Mapping[str, Any] | None:
    """Input and target; None where the target is none of the options."""
    fields = _parse_any_row(row)
    return None if MISTAKEN_TARGETS.get(fields["target"]) == "" else fields


def _options(doc: Doc) -> tuple[str, ...]:
    if doc.subset in FIXED_OPTIONS:
        return FIXED_OPTIONS[doc.subset]
    return tuple(option.strip() for _, option in _OPTION.findall(doc.fields["input"]))


def _correct_letter(doc: Doc) -> str:
    """The correct option's letter, "(B)"."""
    target = MISTAKEN_TARGETS.get(doc.fields["target"], doc.fields["target"])
    if doc.subset in FIXED_OPTIONS:
        names = [option.lower() for option in FIXED_OPTIONS[doc.subset]]
        index = names.index(target.lower()) if target.lower() in names else -1
    else:
        index = LETTERS.find(target[1]) if re.fullmatch(r"\([A-Z]\)", target) else -1
    if not 0 <= index < len(_options(doc)):
        raise DataError(
            f"{doc.subset} {doc.id}: expected one of {list(_options(doc))} as target, "
            f"found {target[:40]!r}; is this the set's own file?"
        )
    return f"({LETTERS[index]})"


def _format_doc(doc: Doc) -> DocText:
    question = f"Question:\n{doc.fields['input']}\n"
    if doc.subset in FREE_FORM:
        target = doc.fields["target"]
        return DocText(input=f"{question}Answer:\n", output=target, gold=target)
    options = f"{REQUIREMENT}Options:\n{lettered(_options(doc))}"
    gold = _correct_letter(doc)
    return DocText(input=f"{question}{options}Answer:\n", output=gold, gold=gold)


def _metric(parsed: str, question: Question) -> float:
    metric = exact_match if question.doc.subset in FREE_FORM else prefix_match
    return metric(parsed, question.gold)


def _early_stop(reply: str, question: Question) -> bool:
    early_stop = after_paragraph if question.doc.subset in FREE_FORM else as_long_as_gold
    return early_stop(reply, question)


BBH = Task(
    name="bbh",
    title="BBH",
    language="en",
    few_shot={"gen": 3},
    source=Source(
        repo="lukaemon/bbh",
        download=("{subset}/test/0000.parquet",),
        questions=(
            "bbh/{subset}.json",
            "{subset}.json",
            *parquet_files("{subset}/test"),
            "bbh.jsonl",
        ),
        parse_row=_parse_row,
        subsets=tuple(SUBJECTS["bbh"]),
        subset_field="task",
        id_field="index",
    ),
    format_doc=_format_doc,
    postprocess=lambda reply, question: (
        bbh_answer(reply) if question.doc.subset in FREE_FORM else reply
    ),
    metric=_metric,
    early_stop=_early_stop,
)


def _worked_examples(cot: str) -> str:
    """The set's prompt for a task, without its two lines that warn against training on it."""
    lines = cot.strip().split("\n")
    if len(lines) > 1 and lines[1].startswith("-----"):
        lines = lines[2:]
    return "\n".join(line.strip() for line in lines).strip()


def _format_cot(doc: Doc) -> DocText:
    prompt = (
        f"{_worked_examples(doc.fields['cot'])}\n\n"
        f"Q: {doc.fields['input'].strip()}\nA: Let's think step by step."
    )
    target = doc.fields["target"]
    return DocText(input=prompt, output=f" So the answer is {target}.", gold=target)


def _cot_metric(parsed: str, question: Question) -> float:
    """Accepts the target, and its letter without the parentheses."""
    gold = question.gold
    bare = gold[1:-1] if gold.startswith("(") and gold.endswith(")") else gold
    return in_match(parsed, (gold, bare))


BBH_COT = Task(
    name="bbh_cot",
    title="BBH-CoT",
    language="en",
    few_shot={"gen": 0},
    source=replace(
        BBH.source,
        questions=tuple(name for name in BBH.source.questions if "parquet" not in name),
        parse_row=_parse_any_row,
        cot_prompts=("cot-prompts/{subset}.txt", "bbh_cot_prompts.jsonl"),
        advice="github.com/suzgunmirac/BIG-Bench-Hard",
    ),
    format_doc=_format_cot,
    max_tokens=1024,
    postprocess=lambda reply, question: bbh_answer(reply),
    metric=_cot_metric,
    early_stop=after_paragraph,
)
