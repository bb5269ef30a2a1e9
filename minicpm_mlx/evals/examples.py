"""The examples before a question.

UltraEval draws them anew for every question, unseeded, from the evaluation set. Here they come from
the set's own examples where it has some, and are drawn once for a subset, by a seed: the same run
can be repeated, and all prompts of a subset begin alike, so that beginning is computed once.
"""

from __future__ import annotations

import random
from functools import lru_cache

from ..errors import DataError
from .data.load import Loaded
from .question import Item
from .task import Task

__all__ = ["shots_for"]


def shots_for(
    task: Task, item: Item, loaded: Loaded, seed: int = 0, count: int | None = None
) -> list[Item]:
    """`count` examples for `item`, never itself; None takes as many as UltraEval for replies.

    DataError where the subset has too few.
    """
    count = task.shots["gen"] if count is None else count
    if count == 0:
        return []
    pool = loaded.shots.get(item.subset) or loaded.items[item.subset]
    order = _order(f"{seed}/{task.name}/{item.subset}", len(pool))
    others = (pool[place] for place in order if pool[place].fields != item.fields)
    shots = [shot for shot, _ in zip(others, range(count), strict=False)]
    if len(shots) < count:
        subset = f" of {item.subset}" if item.subset else ""
        raise DataError(
            f"{loaded.origin}: expected {count} examples for {task.title}{subset}, found "
            f"{len(shots)}; take the whole set, or ask for fewer examples"
        )
    return shots


@lru_cache(maxsize=256)
def _order(seed: str, size: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).sample(range(size), size))
