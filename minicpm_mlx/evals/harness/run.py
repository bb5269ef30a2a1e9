"""Runs tasks of EleutherAI's lm-evaluation-harness on a loaded model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...arguments import at_least_one, whole
from ...engine import WIDTH
from ...errors import DownloadError, InvalidArgumentError, MissingPackageError
from ...files.atomic import named_errors, write_whole
from ..settings import check_thinking

if TYPE_CHECKING:
    from ...lm.lm import LM


RESULTS, SAMPLES = "results.json", "samples_{}.jsonl"
"""Files of a run: the results with all settings, and each task's questions and answers."""

RESAMPLES = 1000
"""Bootstrap samples for standard errors without a formula.

Within a few percent of lm-eval's default, 100,000, in a hundredth of the time."""

Progress = Callable[[str, int, int], object]


class TaskSelection(NamedTuple):
    """Tasks that lm-eval has found."""

    names: tuple[str, ...]
    manager: Any
    """The lm-eval TaskManager that found them."""


class ResultRow(NamedTuple):
    """One line of a table of results."""

    task: str
    metric: str
    value: float
    error: float | None
    """The standard error, where lm-eval computes one."""
    shots: int | None


def choose(tasks: Sequence[str], include_path: str | Path | None = None) -> TaskSelection:
    """Finds `tasks`: names, groups and patterns of lm-eval, or YAML files.

    `include_path` is a folder with YAML files of more tasks, whose names take precedence. Call it
    before a model is loaded: InvalidArgumentError for a task or folder that does not exist,
    MissingPackageError without lm-eval.
    """
    if find_spec("lm_eval") is None:
        raise MissingPackageError(
            'lm-evaluation-harness is missing; install it with: pip install "minicpm-mlx[lm-eval]"'
        )
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else Path(include_path)
    if folder is not None and not folder.is_dir():
        raise InvalidArgumentError(f"{folder}: expected a folder of task files, found none")
    if not tasks:
        raise InvalidArgumentError("expected the name of one task or more, got none")
    # Reading lm-eval's own tasks, almost 15,000, takes seconds: only where they are needed.
    own = TaskManager(include_path=folder, include_defaults=False)
    if all(_is_file(name) or name in own.all_subtasks for name in tasks):
        return TaskSelection(tuple(tasks), own)
    manager = TaskManager(include_path=folder)
    return TaskSelection(tuple(task for name in tasks for task in _match(name, manager)), manager)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _match(name: str, manager: Any) -> list[str]:
    tasks: list[str] = [name] if _is_file(name) else manager.match_tasks([name])
    if not tasks:
        near = get_close_matches(name, manager.all_tasks, n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
        raise InvalidArgumentError(f"lm-eval has no task {name!r}; {advice}")
    return tasks


def run_harness(
    lm: LM,
    tasks: Sequence[str] | TaskSelection,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    apply_chat_template: bool = False,
    think: bool | None = None,
    think_tokens: int | None = None,
    fewshot_as_multiturn: bool = True,
    system_instruction: str | None = None,
    seed: int = 0,
    allow_code: bool = False,
    width: int = WIDTH,
    output: str | Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Scores `lm` on tasks of lm-evaluation-harness; returns the results of `simple_evaluate`.

    `limit` is the number of questions of each task, `num_fewshot` that of examples where the task
    allows any. With `apply_chat_template` the examples are turns of a conversation, or, without
    `fewshot_as_multiturn`, one message; thoughts are no part of the replies that are scored, and
    `think` and `think_tokens` are as of `EvalSettings`. `seed` draws examples and sampled replies.
    `allow_code` lets tasks run the programs that the model writes, which lm-eval does without a
    sandbox. `width` texts are computed at a time. `output` is a folder for results.json and each
    task's samples. `progress` is called with a kind of work, the number done, and the total.

    Tasks read their data from the Hugging Face hub, or from the local files that they name.
    Raises as `choose` and `new_folder`; DownloadError where the data cannot be had or `output` not
    be written.

        run_harness(lm, ["arc_easy"], limit=100)["results"]["arc_easy"]["acc,none"]
    """
    folder = None if output is None else new_folder(output)
    selection = tasks if isinstance(tasks, TaskSelection) else choose(tasks, include_path)
    for name, value in (("limit", limit), ("num_fewshot", num_fewshot)):
        if value is not None and whole(name, value) < (name == "limit"):
            raise InvalidArgumentError(f"{name} must be {int(name == 'limit')} or more")
    check_thinking(think, think_tokens, apply_chat_template)
    import lm_eval

    from .model import MiniCPM

    model = MiniCPM(
        lm,
        width=at_least_one("width", width),
        seed=seed,
        think=think,
        think_tokens=think_tokens,
        progress=progress,
    )
    with _in_own_process(), _user_errors():
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model=model,
            tasks=list(selection.names),
            task_manager=selection.manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=fewshot_as_multiturn and apply_chat_template,
            system_instruction=system_instruction,
            bootstrap_iters=RESAMPLES,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            confirm_run_unsafe_code=allow_code,
        )
    if folder is not None:
        _write(results, folder)
    return results


def new_folder(folder: str | Path) -> Path:
    """The folder, which must not have results yet; InvalidArgumentError otherwise."""
    path = Path(folder)
    if (path / RESULTS).exists():
        raise InvalidArgumentError(f"{path} has results of lm-eval already; give another folder")
    if path.exists() and not path.is_dir():
        raise InvalidArgumentError(f"{path} is a file; expected a folder, or a new name")
    return path


@contextmanager
def _in_own_process() -> Iterator[None]:
    """Sends lm-eval's output to stderr, and keeps it from forking this process to resample."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        del os.environ["DISABLE_MULTIPROC"]
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turns lm-eval's errors that a user can correct into ours."""
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f"the data of a task cannot be downloaded ({error}); connect to the network, or give a "
            "task that reads local files"
        ) from error
    except ValueError as error:
        if "marked as unsafe" not in str(error):
            raise
        raise InvalidArgumentError(
            f"{error.args[0].partition('.')[0]}: it runs programs that the model writes, and "
            "lm-eval does so without a sandbox; allow it with --allow-code (allow_code=True)"
        ) from None


def figures(results: Mapping[str, Any]) -> list[ResultRow]:
    """The results of a run as rows in lm-eval's order, groups first."""
    rows = []
    for task, metrics in {**results.get("groups", {}), **results["results"]}.items():
        for name, value in metrics.items():
            metric, _, result_filter = name.partition(",")
            is_score = result_filter and not metric.endswith("_stderr")
            if not is_score or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{result_filter}")
            label = metric if result_filter == "none" else f"{metric} ({result_filter})"
            error = error if isinstance(error, int | float) else None
            shots = results.get("n-shot", {}).get(task)
            rows.append(ResultRow(str(metrics.get("alias", task)), label, value, error, shots))
    return rows


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results for JSON, without the questions and answers."""
    plain: dict[str, Any] = json.loads(
        _json({name: part for name, part in results.items() if name != "samples"})
    )
    return plain


def _json(value: object) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(value, ensure_ascii=False, default=handle_non_serializable)


def _write(results: Mapping[str, Any], folder: Path) -> None:
    files = {
        SAMPLES.format(task.replace("/", "__")): "".join(f"{_json(row)}\n" for row in rows)
        for task, rows in results.get("samples", {}).items()
    }
    # Last, since a folder with results counts as complete.
    files[RESULTS] = json.dumps(summary(results), ensure_ascii=False, indent=2) + "\n"
    with named_errors(folder, "give another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            data = text.encode(errors="backslashreplace")
            write_whole(folder / name, partial(Path.write_bytes, data=data))
