"""Which Mac trains which model in 4 bits, by the program's own planner: the tables of the guides.

    python benchmarks/training_plans.py

Planned, not measured; the same on every machine. LoRA of rank 8 on all layers, 4 samples a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

from minicpm_mlx import device
from minicpm_mlx.bench.shapes import packed_config
from minicpm_mlx.files.tables import markdown_table
from minicpm_mlx.train.lora import LoRAConfig
from minicpm_mlx.train.memory import estimate_memory, fit_to_memory

MODELS = {
    "MiniCPM5-1B": "5-1b-shape",
    "MiniCPM5-2B": "5-2b-shape",
    "MiniCPM-2B": "2b-shape",
    "MiniCPM3-4B": "3-4b-shape",
    "MiniCPM4-8B": "4-8b-shape",
}
"""Shape by name; MiniCPM4.1-8B is as MiniCPM4-8B."""
MACS = (8, 16, 32)
"""Memory in GB."""
LENGTHS = (512, 1024, 2048, 4096)
"""Tokens of the longest sample."""
LORA = LoRAConfig(rank=8)


def memory_rows(shape: str) -> Iterator[list[str]]:
    """GB by length: one and four samples at once, layers computed twice and kept."""
    for length in LENGTHS:
        totals = [
            estimate_memory(
                packed_config(shape),
                LORA,
                batch_size=size,
                length=length,
                checkpointing=twice,
            ).total
            for size in (1, 4)
            for twice in (True, False)
        ]
        yield [str(length), *(f"{total / 1e9:.1f}" for total in totals)]


def plan_rows() -> Iterator[list[str]]:
    """Samples at once of conversations / of preferences, by model, Mac and length; "t": layers are
    computed twice, "—": not even one fits."""
    for name, shape in MODELS.items():
        for memory in MACS:
            with patch.object(device, "available_memory", lambda gb=memory: gb * 2**30 * 3 // 4):
                cells = [
                    f"{_plan(shape, n, 'sft')} / {_plan(shape, n, 'preference')}" for n in LENGTHS
                ]
            yield [name, f"{memory} GB", *cells]


def _plan(shape: str, length: int, kind: str) -> str:
    found = fit_to_memory(packed_config(shape), LORA, samples=4, length=length, kind=kind)
    twice = " t" if found.checkpointing else ""
    return f"{found.batch_size}{twice}" if found.fits else "—"


def tables() -> Iterator[str]:
    """The rows of each table, without its head."""
    with patch.object(device, "on_cpu", lambda: False):
        for rows in (list(memory_rows("2b-shape")), list(plan_rows())):
            table = markdown_table([""] * len(rows[0]), rows)
            yield "\n".join(table.split("\n")[2:])


if __name__ == "__main__":
    print(*tables(), sep="\n\n")
