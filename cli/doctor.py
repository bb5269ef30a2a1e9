"""`minicpm-mlx doctor`: the device in use, advice that makes it faster, and proof that it works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from minicpm_mlx.errors import InvalidArgumentError

from . import options
from .render.theme import console
from .streams import print_json, progress

if TYPE_CHECKING:
    from minicpm_mlx.memory import MemoryEstimate
    from minicpm_mlx.verify.results import CheckResult


GB = 1e9
PARTS = ("weights", "cache", "working")
"""Of a model's memory."""
OUTCOMES = {"pass": "good", "fail": "error", "not checked": "quiet"}
"""Styles of a check's outcome."""


def doctor(
    as_json: options.Json = False,
    prove: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check that this machine computes right, and measure how fast, in a minute or two;"
            " exit status 1 if a check fails.",
        ),
    ] = False,
    as_markdown: Annotated[
        bool,
        typer.Option(
            "--markdown",
            help="With --verify: print the report as Markdown, to paste into an issue.",
        ),
    ] = False,
) -> None:
    """Show the device, BLAS and number format in use, and advice that makes them faster."""
    from minicpm_mlx.doctor import advice, examine, kept_plans

    if as_markdown and as_json:
        raise InvalidArgumentError("--markdown contradicts --json; leave one out")
    if as_markdown and not prove:
        raise InvalidArgumentError("--markdown is a form of the report of --verify; give both")
    if prove:
        _verify(as_json=as_json, as_markdown=as_markdown)
        return
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


def _verify(*, as_json: bool, as_markdown: bool) -> None:
    """Print the report; exit with 1 if a check failed."""
    from minicpm_mlx.verify.run import verify

    out, plain = console(), as_json or as_markdown
    show = progress()

    def show_result(result: CheckResult) -> None:
        show("" if not plain else f"{result.title}: {result.outcome}")
        if plain:
            return
        detail = result.got
        if result.expected:
            detail += f" ({result.expected})" if result.got != result.expected else ""
        out.print(f"{result.outcome:<13}", style=OUTCOMES[result.outcome], end="")
        out.print(f"{result.title:<50} {detail}")

    report = verify(show_result, on_bench=lambda: show("measuring speed …"))
    show("")
    if as_json:
        print_json(report.record())
    elif as_markdown:
        print(report.markdown())
    else:
        if report.bench:
            out.print(report.speed())
            out.print(f"power: {report.machine['power']}, heat: {report.machine['thermal']}")
        out.print(report.summary, style="good" if report.passed else "error")
    if not report.passed:
        if plain:  # what is printed is read by others
            console(stderr=True).print(report.summary, style="error")
        raise typer.Exit(1)


def _record(plan: MemoryEstimate) -> dict[str, Any]:
    sizes = {f"{key}_bytes": getattr(plan, key) for key in (*PARTS, "available")}
    return sizes | {"context": plan.context, "fits": plan.fits}
