"""`minicpm-mlx doctor`: what this machine computes on, and what would be faster."""

from __future__ import annotations

import json

from . import options
from .theme import console


def doctor(as_json: options.Json = False) -> None:
    """Say which device, BLAS and number format are in use, and what would be faster."""
    from minicpm_mlx.doctor import advice, examine

    facts = examine()
    hints = advice(facts)
    if as_json:
        print(json.dumps({**facts, "advice": hints}, ensure_ascii=False))
        return
    out = console()
    width = max(map(len, facts)) + 2
    for key, value in facts.items():
        out.print(f"{key:<{width}}", style="title", end="")
        out.print("none" if value is None else value)
    for hint in hints:
        out.print(hint, style="warning")
    if not hints:
        out.print("nothing to improve", style="good")
