"""BBH with a chain of thought: after three worked examples that the set gives for each task."""

from __future__ import annotations

from dataclasses import replace

from ..question import Item, Question
from ..scoring.early_stop import after_paragraph
from ..scoring.metrics import in_match
from ..scoring.parsing import bbh_answer
from ..task import COT, Example, Task
from .bbh import BBH, read_row

__all__ = ["BBH_COT"]


def worked_examples(cot: str) -> str:
    """The set's prompt for a task, without the two lines that warn of training on it."""
    lines = cot.strip().split("\n")
    if len(lines) > 1 and lines[1].startswith("-----"):
        lines = lines[2:]
    return "\n".join(line.strip() for line in lines).strip()


def ask(item: Item) -> Example:
    """The worked examples and the input."""
    prompt = (
        f"{worked_examples(item.fields['cot'])}\n\n"
        f"Q: {item.fields['input'].strip()}\nA: Let's think step by step."
    )
    target = item.fields["target"]
    return Example(input=prompt, output=f" So the answer is {target}.", gold=target)


def answer(reply: str, question: Question) -> str:
    """What is announced as the answer."""
    return bbh_answer(reply)


def is_gold(parsed: str, question: Question) -> float:
    """in_match: the target, or the letter in its parentheses alone."""
    gold = question.gold
    bare = gold[1:-1] if gold.startswith("(") and gold.endswith(")") else gold
    return in_match(parsed, (gold, bare))


BBH_COT = Task(
    name="bbh_cot",
    title="BBH-CoT",
    language="en",
    shots={"gen": 0},
    source=replace(
        BBH.source,
        items=tuple(name for name in BBH.source.items if "parquet" not in name),
        read=read_row,
        beside=("cot-prompts/{subset}.txt", "bbh_cot_prompts.jsonl"),
        advice="github.com/suzgunmirac/BIG-Bench-Hard",
    ),
    ask=ask,
    settings=COT,
    max_tokens=1024,
    read=answer,
    match=is_gold,
    enough=after_paragraph,
)
