"""`minicpm-mlx eval`: MiniCPM's published table, measured on another model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minicpm_mlx.errors import InvalidArgumentError

from .. import options, paths
from ..render.theme import console
from ..streams import print_json, progress, resumable
from .harness import run_lm_eval
from .mt_bench import mt_bench
from .options import EvalOptions

if TYPE_CHECKING:
    from minicpm_mlx.evals.report.compare import RunComparison
    from minicpm_mlx.evals.run import EvalProgress

app = typer.Typer(invoke_without_command=True)


def _check_run(folder: Path) -> None:
    from minicpm_mlx.evals.record import RunRecord

    RunRecord.read(folder)


WITHOUT_TEMPLATE = "leave out --chat-template"

CHANGED = 10
"""Questions of each kind that `compare` names; --json has all."""


@app.callback()
@options.may_download
@options.command(EvalOptions)
def evaluate(args: EvalOptions) -> None:
    """Score a model as MiniCPM's README does; see also `eval compare` and `eval mt-bench`.

    The same command resumes an interrupted run.
    """
    if args.context.invoked_subcommand is not None:
        return
    from minicpm_mlx.evals.report.tables import titled_scores
    from minicpm_mlx.evals.run import check_folder, model_name, prepare, run
    from minicpm_mlx.evals.settings import ALL

    if args.tasks is None:
        raise InvalidArgumentError(
            f"expected --tasks: all, or some of {','.join(ALL)}; `eval --help` says more"
        )
    if args.harness is not None or args.include_path is not None:
        with options.advise_without_template(WITHOUT_TEMPLATE):
            run_lm_eval(args)
        return
    plan = prepare(args.settings(), args.data)
    if args.output is not None:
        check_folder(args.output, plan)
    lm = options.load_model(args.checked_model(), args.compute, adapter=args.adapter)
    folder = args.output or Path(f"eval-{model_name(lm)}")
    with resumable(lambda: folder), options.advise_without_template(WITHOUT_TEMPLATE):
        report = run(lm, plan, folder, progress=_progress())
    if args.as_json:
        print_json(report.to_json())
        return
    _print_markdown(titled_scores(report))
    stderr = console(stderr=True)
    if report.why_alone:
        stderr.print(report.why_alone, style="quiet")
    for task in report.tasks:
        notes = [note for part in task.parts.values() for note in part.settings["notes"]]
        for note in dict.fromkeys(notes):
            stderr.print(f"{task.title}: {note}", style="quiet")
    stderr.print(f"details: {folder / 'report.md'}", style="quiet")


@app.command("compare")
def compare(
    first: Annotated[
        Path, typer.Argument(help="Folder of a run.", callback=paths.checked(_check_run))
    ],
    second: Annotated[
        Path,
        typer.Argument(help="Folder of another run.", callback=paths.checked(_check_run)),
    ],
    as_json: options.Json = False,
) -> None:
    """Say whether the second of two runs is better than the first, and on which questions."""
    from minicpm_mlx.evals.report.compare import compare_runs

    comparison = compare_runs(first, second)
    if as_json:
        print_json(comparison.to_json())
    else:
        _print_markdown("\n".join(_comparison(comparison)))


app.command("mt-bench")(mt_bench)


def _print_markdown(markdown: str) -> None:
    """Renders Markdown at a terminal; elsewhere prints its source."""
    out = console()
    if not out.is_terminal:
        out.print(markdown)
        return
    from ..render.markdown import MarkdownStream  # loads pygments

    stream = MarkdownStream(out)
    stream.feed(f"{markdown}\n")
    stream.close()


def _progress() -> Callable[[EvalProgress], None]:
    """A line that moves at a terminal; elsewhere one line as each part ends."""
    stderr, show = console(stderr=True), progress()
    shown_at = 0.0

    def update(now: EvalProgress) -> None:
        nonlocal shown_at
        complete = now.done == now.total
        if stderr.is_terminal and not complete:
            if time.monotonic() - shown_at > 0.1 or not now.done:
                shown_at = time.monotonic()
                show(_progress_line(now))
        elif complete:
            show("")
            stderr.print(_progress_line(now), style="quiet")

    return update


def _progress_line(now: EvalProgress) -> str:
    words = [f"{now.part.task.title} {now.part.mode}", f"{now.done} of {now.total}"]
    if now.mean is not None:
        words.append(f"{now.mean:.1%} so far" if now.done < now.total else f"{now.mean:.1%}")
    if now.seconds_left is not None and now.done < now.total:
        minutes, seconds = divmod(round(now.seconds_left), 60)
        hours, minutes = divmod(minutes, 60)
        words.append(f"{hours}:{minutes:02}:{seconds:02} left")
    return ", ".join(words)


def _comparison(comparison: RunComparison) -> Iterator[str]:
    first, second = comparison.models
    yield f"1: {first}, 2: {second}"
    yield ""
    yield "| part | 1 | 2 | difference | 95 % | p | questions | up | down |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for name, part in comparison.parts.items():
        test = part.comparison
        yield (
            f"| {name} | {part.first:.2f} | {part.second:.2f} "
            f"| {100 * test.difference:+.2f} | {100 * test.low:+.1f} to {100 * test.high:+.1f} "
            f"| {test.p:.3g} ({test.method}) "
            f"| {part.questions} | {len(part.gained)} | {len(part.lost)} |"
        )
    for name, part in comparison.parts.items():
        for direction, keys in (("up", part.gained), ("down", part.lost)):
            if keys:
                shown = ", ".join(" ".join(filter(None, key)) for key in keys[:CHANGED])
                more = f" and {len(keys) - CHANGED} more" if len(keys) > CHANGED else ""
                yield f"{name}, {direction}: {shown}{more}"
    yield from comparison.notes
