"""`minicpm-mlx eval --harness lm-eval`: tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from minicpm_mlx.errors import InvalidArgumentError

from .. import options
from ..render.theme import console
from ..streams import print_json, progress

if TYPE_CHECKING:
    from minicpm_mlx.evals.harness.run import ResultRow, TaskSelection

    from .options import EvalOptions

HARNESS = "lm-eval"

INAPPLICABLE = ("mode", "data", "subjects", "sampling", "whole_replies")
"""Options of `eval` that lm-eval's tasks decide for themselves."""


def run_lm_eval(args: EvalOptions) -> None:
    """Loads the model, runs the tasks and prints the results."""
    from minicpm_mlx.evals.harness.run import figures, new_folder, run_harness, summary
    from minicpm_mlx.evals.settings import check_thinking

    check_thinking(args.thinking.think, args.thinking.think_tokens, args.chat_template)
    selection = _select_tasks(args)  # before a model is loaded
    folder = None if args.output is None else new_folder(args.output)
    lm = options.load_model(args.checked_model(), args.compute, adapter=args.adapter)
    folder = folder or new_folder(f"lm-eval-{lm.card.name}")
    show = progress()
    results = run_harness(
        lm,
        selection,
        output=folder,
        progress=lambda name, done, of: show(f"{name} {done} of {of}" if done < of else ""),
        limit=args.limit,
        num_fewshot=args.shots,
        apply_chat_template=args.chat_template,
        **vars(args.thinking),
        seed=args.seed,
        allow_code=args.allow_code,
        width=args.width,
    )
    if args.as_json:
        print_json(summary(results))
        return
    console().print("\n".join(_table(figures(results))), highlight=False)
    console(stderr=True).print(f"details: {folder / 'results.json'}", style="quiet")


def _select_tasks(args: EvalOptions) -> TaskSelection:
    from minicpm_mlx.evals.harness.run import choose

    if args.harness is None:
        raise InvalidArgumentError(f"--include-path is for --harness {HARNESS}; give that too")
    for name in INAPPLICABLE:
        source = args.context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            option = "--" + name.replace("_", "-")
            raise InvalidArgumentError(
                f"{option} is for the tasks of this program; those of {HARNESS} decide it "
                "themselves"
            )
    return choose(args.task_names, args.include_path)


def _table(rows: Sequence[ResultRow]) -> Iterator[str]:
    yield "| task | metric | value | standard error | examples |"
    yield "|---|---|---:|---:|---:|"
    for row in rows:
        error = "" if row.error is None else f"{row.error:.4f}"
        shots = "" if row.shots is None else str(row.shots)
        yield f"| {row.task} | {row.metric} | {row.value:.4f} | {error} | {shots} |"
