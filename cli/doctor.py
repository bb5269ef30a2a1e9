"""`minicpm-mlx doctor`: the device in use, and advice that makes it faster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import options
from .render.theme import console
from .streams import print_json

if TYPE_CHECKING:
    from minicpm_mlx.memory import MemoryEstimate


GB = 1e9
PARTS = ("weights", "cache", "working")
"""Of a model's memory."""


def doctor(as_json: options.Json = False) -> None:
    """Show the device, BLAS and number format in use, and advice that makes them faster."""
    from minicpm_mlx.doctor import advice, examine, kept_plans

    facts = examine()
    hints = advice(facts)
    plans = {name: _record(plan) for name, plan in kept_plans().items()}
    if as_json:
        print_json({**facts, "models": plans, "advice": hints})
        return
    out = console()
    width = max(map(len, facts)) + 2
    for key, value in facts.items():
        out.print(f"{key.removesuffix('_bytes'):<{width}}", style="title", end="")
        shown = f"{value / GB:.1f} GB" if isinstance(value, int) else value
        out.print("none" if shown is None else shown)
    for name, plan in plans.items():
        weights, cache, working = (plan[f"{key}_bytes"] / GB for key in PARTS)
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


def _record(plan: MemoryEstimate) -> dict[str, Any]:
    sizes = {f"{key}_bytes": getattr(plan, key) for key in (*PARTS, "available")}
    return sizes | {"context": plan.context, "fits": plan.fits}
