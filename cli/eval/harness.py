"""`minicpm-mlx eval --harness lm-eval`: tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import options
from ..render.theme import console

if TYPE_CHECKING:
    import typer

    from minicpm_mlx.evals.harness.run import Chosen, ResultRow

HARNESS = "lm-eval"

NOT_FOR_IT = ("mode", "data", "subjects", "sampling", "whole_replies")
"""Options of `eval` that its own tasks have, and lm-eval's say for themselves."""


def chosen(
    context: typer.Context, harness: str | None, tasks: Sequence[str], include_path: Path | None
) -> Chosen:
    """The tasks, found before a model is loaded; what cannot be honoured is refused."""
    from minicpm_mlx.errors import InvalidArgumentError
    from minicpm_mlx.evals.harness.run import choose

    if harness != HARNESS:
        if harness is None:
            raise InvalidArgumentError(f"--include-path is for --harness {HARNESS}; give that too")
        raise InvalidArgumentError(f"--harness must be {HARNESS}, got {harness!r}")
    for name in NOT_FOR_IT:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            option = "--" + name.replace("_", "-")
            raise InvalidArgumentError(
                f"{option} is for the tasks of this program; those of {HARNESS} say it themselves"
            )
    return choose(tasks, include_path)


def run(
    chosen: Chosen,
    model: str,
    dtype: str | None,
    device: str | None,
    adapter: str | None,
    output: Path | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Load the model, run the tasks, print what came out; `how` as of `run_harness`."""
    from minicpm_mlx.evals.harness.run import (
        figures,
        new_folder,
        run_harness,
        summary,
    )

    given = None if output is None else new_folder(output)
    lm = options.load(model, dtype, device, adapter=adapter)
    folder = given or new_folder(f"lm-eval-{lm.card.name}")
    tell = options.progress()
    results = run_harness(
        lm,
        chosen,
        output=folder,
        progress=lambda what, done, of: tell(f"{what} {done} of {of}" if done < of else ""),
        **how,
    )
    if as_json:
        print(json.dumps(summary(results), ensure_ascii=False))
        return
    console().print("\n".join(_table(figures(results))), highlight=False)
    console(stderr=True).print(f"{folder / 'results.json'} has all of it", style="quiet")


def _table(found: Sequence[ResultRow]) -> Iterator[str]:
    yield "| task | metric | value | standard error | examples |"
    yield "|---|---|---:|---:|---:|"
    for one in found:
        error = "" if one.error is None else f"{one.error:.4f}"
        shots = "" if one.shots is None else str(one.shots)
        yield f"| {one.task} | {one.metric} | {one.value:.4f} | {error} | {shots} |"
