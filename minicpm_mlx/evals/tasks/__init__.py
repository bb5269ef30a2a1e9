"""All tasks, in the order of the published table. Only `evals` and its users import this."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..task import Task
from .arc import ARC_CHALLENGE, ARC_EASY
from .bbh import BBH, BBH_COT
from .exams import CEVAL, CMMLU, MMLU
from .gsm8k import GSM8K
from .hellaswag import HELLASWAG
from .humaneval import HUMANEVAL
from .math import MATH
from .mbpp import MBPP

__all__ = ["TASKS"]

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            *(CEVAL, CMMLU, MMLU, HUMANEVAL, MBPP, GSM8K),
            *(MATH, BBH, BBH_COT, ARC_EASY, ARC_CHALLENGE, HELLASWAG),
        )
    }
)
"""By name."""
