"""Draws the few-shot examples of a question.

UltraEval draws them anew for every question, unseeded, from the evaluation set. Here they come from
the set's own examples where it has some, and are drawn once for a subset, with a seed. The same run
can be repeated, and all prompts of a subset share a beginning, which is computed once.
"""

from __future__ import annotations

import random
from functools import lru_cache

from ..errors import DataError
from .data.load import EvalData
from .question import Doc
from .task import Task


def draw_examples(
    task: Task, doc: Doc, data: EvalData, seed: int = 0, count: int | None = None
) -> list[Doc]:
    """`count` examples for `doc`, never itself; None takes UltraEval's number for mode "gen".

    DataError where the subset has too few.
    """
    count = task.few_shot["gen"] if count is None else count
    if count == 0:
        return []
    pool = data.examples.get(doc.subset) or data.docs[doc.subset]
    order = _order(f"{seed}/{task.name}/{doc.subset}", len(pool))
    others = (pool[index] for index in order if pool[index].fields != doc.fields)
    examples = [example for example, _ in zip(others, range(count), strict=False)]
    if len(examples) < count:
        subset = f" of {doc.subset}" if doc.subset else ""
        raise DataError(
            f"{data.origin}: expected {count} examples for {task.title}{subset}, found "
            f"{len(examples)}; take the whole set, or ask for fewer examples"
        )
    return examples


@lru_cache(maxsize=256)
def _order(seed: str, size: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).sample(range(size), size))
