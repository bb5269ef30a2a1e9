"""`minicpm-mlx doctor`: the device in use, and advice that makes it faster."""

from __future__ import annotations

from dataclasses import asdict

from . import options
from .render.theme import console
from .streams import print_json


def doctor(as_json: options.Json = False) -> None:
    """Show the device, BLAS and number format in use, and advice that makes them faster."""
    from minicpm_mlx.doctor import advice, examine, kept_plans

    facts = examine()
    hints = advice(facts)
    plans = {name: asdict(plan) | {"fits": plan.fits} for name, plan in kept_plans().items()}
    if as_json:
        print_json({**facts, "models": plans, "advice": hints})
        return
    out = console()
    width = max(map(len, facts)) + 2
    for key, value in facts.items():
        out.print(f"{key:<{width}}", style="title", end="")
        out.print("none" if value is None else value)
    for name, plan in plans.items():
        weights, cache, working = (plan[key] / 1e9 for key in ("weights", "cache", "working"))
        out.print(f"{name:<{width}}", style="title", end="")
        out.print(
            f"{weights:.1f} GB of weights + {cache:.1f} of cache at {plan['context']} tokens "
            f"+ {working:.1f} to work with",
            style="" if plan["fits"] else "warning",
        )
    for hint in hints:
        out.print(hint, style="warning")
    if not hints:
        out.print("nothing to improve", style="good")
