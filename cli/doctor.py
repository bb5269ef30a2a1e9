"""`minicpm-mlx doctor`: what this machine computes on, and what would be faster."""

from __future__ import annotations

import json
from dataclasses import asdict

from . import options
from .render.theme import console


def doctor(as_json: options.Json = False) -> None:
    """Say which device, BLAS and number format are in use, and what would be faster."""
    from minicpm_mlx.doctor import advice, examine, kept_plans

    facts = examine()
    hints = advice(facts)
    plans = {name: asdict(found) | {"fits": found.fits} for name, found in kept_plans().items()}
    if as_json:
        print(json.dumps({**facts, "models": plans, "advice": hints}, ensure_ascii=False))
        return
    out = console()
    width = max(map(len, facts)) + 2
    for key, value in facts.items():
        out.print(f"{key:<{width}}", style="title", end="")
        out.print("none" if value is None else value)
    for name, found in plans.items():
        weights, cache, working = (found[key] / 1e9 for key in ("weights", "cache", "working"))
        out.print(f"{name:<{width}}", style="title", end="")
        out.print(
            f"{weights:.1f} GB of weights + {cache:.1f} of cache at {found['context']} tokens "
            f"+ {working:.1f} to work with",
            style="" if found["fits"] else "warning",
        )
    for hint in hints:
        out.print(hint, style="warning")
    if not hints:
        out.print("nothing to improve", style="good")
