"""`minicpm-mlx eval`: MiniCPM's published table, measured on a model of one's own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import options
from ..render.markdown import MarkdownStream
from ..render.theme import console
from .mt_bench import kept, mt_bench

if TYPE_CHECKING:
    from minicpm_mlx.evals.report.compare import RunComparison
    from minicpm_mlx.evals.run import EvalProgress

app = typer.Typer(invoke_without_command=True)

CHANGED = 10
"""Questions that `compare` names of each kind; --json has all."""

Data = Annotated[
    Path | None, typer.Option("--data", help="Folder with the data; without it, from the hub.")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", help="Folder of the run, gone on with if there; else eval-MODEL."),
]


@app.callback()
def evaluate(
    context: typer.Context,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="all, or some of ceval, cmmlu, mmlu, humaneval, mbpp, gsm8k, math, bbh, bbh_cot, "
            "arc_easy, arc_challenge, hellaswag, with commas.",
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option("--mode", help="gen: read replies. ppl: compare options. both.")
    ] = "gen",
    data: Data = None,
    model: options.Model = options.DEFAULT_MODEL,
    adapter: options.Adapter = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Most questions of a subject; drawn by the seed.")
    ] = None,
    subjects: Annotated[
        str | None, typer.Option("--subjects", help="Only these subjects or subsets, with commas.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            "--shots", "--num-fewshot", help="Examples before a question; else UltraEval's."
        ),
    ] = None,
    sampling: Annotated[
        str, typer.Option("--sampling", help="greedy, or ultraeval: as the table was made.")
    ] = "greedy",
    seed: Annotated[int, typer.Option("--seed", help="Draws questions, examples, replies.")] = 0,
    chat_template: Annotated[
        bool,
        typer.Option("--chat-template/--no-chat-template", help="Ask as a user, not as a text."),
    ] = False,
    whole_replies: Annotated[
        bool, typer.Option("--whole-replies", help="Go on where the score is decided already.")
    ] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run programs the model writes, shut in.")
    ] = False,
    output: Output = None,
    batch: Annotated[int, typer.Option("--batch", help="Replies made at once.")] = 8,
    harness: Annotated[
        str | None,
        typer.Option("--harness", help="lm-eval: --tasks are lm-evaluation-harness's own."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", help="Folder with more tasks for lm-eval.")
    ] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Score a model as MiniCPM's README does; `eval compare` and `eval mt-bench` have more.

    Interrupted, the same command goes on where it was.
    """
    if context.invoked_subcommand is not None:
        return
    from minicpm_mlx.arguments import limits
    from minicpm_mlx.errors import InvalidArgumentError
    from minicpm_mlx.evals.report.tables import scores_table
    from minicpm_mlx.evals.run import model_name, prepare, run
    from minicpm_mlx.evals.settings import ALL, EvalSettings

    if tasks is None:
        raise InvalidArgumentError(
            f"expected --tasks: all, or some of {','.join(ALL)}; `eval --help` says more"
        )
    if harness is not None or include_path is not None:
        from . import harness as lm_eval

        found = lm_eval.chosen(context, harness, _listed(tasks), include_path)
        lm_eval.run(
            found,
            model,
            dtype,
            device,
            adapter,
            output,
            as_json,
            limit=limit,
            num_fewshot=shots,
            apply_chat_template=chat_template,
            seed=seed,
            allow_code=allow_code,
            width=batch,
        )
        return
    limits(EvalSettings)["width"].check("--batch", batch)
    settings = EvalSettings(
        tasks=_listed(tasks),
        mode=mode,
        limit=limit,
        subjects=_listed(subjects or ""),
        shots=shots,
        sampling=sampling,
        seed=seed,
        chat_template=chat_template,
        whole_replies=whole_replies,
        allow_code=allow_code,
        width=batch,
    )
    plan = prepare(settings, data)
    lm = options.load(model, dtype, device, adapter=adapter)
    folder = output or Path(f"eval-{model_name(lm)}")
    with kept(folder):
        report = run(lm, plan, folder, progress=_teller())
    if as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False))
        return
    _show(scores_table(report))
    for task in report.tasks:
        for note in dict.fromkeys(
            n for part in task.parts.values() for n in part.settings["notes"]
        ):
            console(stderr=True).print(f"{task.title}: {note}", style="quiet")
    console(stderr=True).print(f"{folder / 'report.md'} has all of it", style="quiet")


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(help="Folder of another.")],
    as_json: options.Json = False,
) -> None:
    """Say whether the second of two runs is better than the first, and on which questions."""
    from minicpm_mlx.evals.report.compare import compare_runs

    found = compare_runs(first, second)
    if as_json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
        return
    _show("\n".join(_compared(found)))


app.command("compare")(compare)
app.command("mt-bench")(mt_bench)


def _show(markdown: str) -> None:
    """Drawn at a terminal, as narrow as it is; elsewhere the text itself."""
    out = console()
    if not out.is_terminal:
        out.print(markdown)
        return
    stream = MarkdownStream(out)
    stream.feed(f"{markdown}\n")
    stream.close()


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _teller() -> Callable[[EvalProgress], None]:
    """A line that moves at a terminal; elsewhere one for each part that begins or ends."""
    err, tell = console(stderr=True), options.progress()
    last = 0.0

    def told(now: EvalProgress) -> None:
        nonlocal last
        whole = now.done == now.total
        if err.is_terminal and not whole:
            if time.monotonic() - last > 0.1 or not now.done:
                last = time.monotonic()
                tell(_line(now))
        elif whole:
            tell("")
            err.print(_line(now), style="quiet")

    return told


def _line(now: EvalProgress) -> str:
    words = [f"{now.part.task.title} {now.part.mode}", f"{now.done} of {now.total}"]
    if now.mean is not None:
        words.append(f"{now.mean:.1%} so far" if now.done < now.total else f"{now.mean:.1%}")
    if now.seconds_left is not None and now.done < now.total:
        minutes, seconds = divmod(round(now.seconds_left), 60)
        hours, minutes = divmod(minutes, 60)
        words.append(f"{hours}:{minutes:02}:{seconds:02} left")
    return ", ".join(words)


def _compared(found: RunComparison) -> Iterator[str]:
    first, second = found.models
    yield f"1: {first}, 2: {second}"
    yield ""
    yield "| part | 1 | 2 | difference | 95 % | p | questions | up | down |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for name, part in found.parts.items():
        how = part.comparison
        yield (
            f"| {name} | {part.first:.2f} | {part.second:.2f} | {100 * how.difference:+.2f} "
            f"| {100 * how.low:+.1f} to {100 * how.high:+.1f} | {how.p:.3g} ({how.method}) "
            f"| {part.questions} | {len(part.gained)} | {len(part.lost)} |"
        )
    for name, part in found.parts.items():
        for word, keys in (("up", part.gained), ("down", part.lost)):
            if keys:
                shown = ", ".join(" ".join(filter(None, key)) for key in keys[:CHANGED])
                more = f" and {len(keys) - CHANGED} more" if len(keys) > CHANGED else ""
                yield f"{name}, {word}: {shown}{more}"
    yield from found.notes
