"""The rule by which MLX chooses its Metal kernel for one row times a packed matrix.

Read in MLX's sources (0.31.0 to 0.32.1) and in its published Mac libraries (0.32.2 to 0.32.4). The
fast kernel reads a whole step of inputs at a time, so the inputs must be a multiple of that step;
until 0.32.3 the outputs must be a multiple of 8 too, and those of stacked experts still must.
"""

from __future__ import annotations

import re

FIRST_READ, LAST_READ = "0.31.0", "0.32.4"
"""The oldest and the newest MLX in which the rule was read."""

ROWS = 8
"""Outputs that a group of threads computes."""

FAST, GUARDED, GENERIC, QUAD = "qmv_fast", "qmv_fast, guarded rows", "qmv", "qmv_quad"


def step(bits: int, mlx: str) -> int:
    """Inputs that the fast kernel takes at a time."""
    if _parse(mlx) <= (0, 32, 0):
        return 512
    values = 8 if bits in (3, 5) else 4 if bits == 6 else 32 // bits  # in a pack
    return values * (1 if bits <= 2 else 2) * 32


def choose(outputs: int, inputs: int, bits: int, mlx: str, *, stacked: bool = False) -> str:
    """The kernel for a product of one row; `stacked` for experts in one array."""
    if inputs in (64, 128) and bits in (2, 4, 8) and not stacked:
        return QUAD
    if inputs % step(bits, mlx):
        return GENERIC
    if outputs % ROWS == 0:
        return FAST
    return GUARDED if _parse(mlx) >= (0, 32, 4) and not stacked else GENERIC


def warning(mlx: str) -> str | None:
    """A line for an MLX outside the versions in which the rule was read."""
    if _parse(FIRST_READ) <= _parse(mlx) <= _parse(LAST_READ):
        return None
    return (
        f"MLX {mlx or 'of an unknown version'} may choose other kernels than this program "
        f"expects: the rule was read in MLX {FIRST_READ} to {LAST_READ}."
    )


def _parse(mlx: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", mlx)[:3])
