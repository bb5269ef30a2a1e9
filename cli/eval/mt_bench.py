"""`minicpm-mlx eval mt-bench`: conversations of two turns, rated by a judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import options
from ..render.theme import console

if TYPE_CHECKING:
    from minicpm_mlx.evals.mt_bench.judge_client import Endpoint
    from minicpm_mlx.evals.mt_bench.run import BenchScores


def mt_bench(
    data: Annotated[Path, typer.Option("--data", help="FastChat's llm_judge/data/mt_bench.")],
    model: options.Model = options.DEFAULT_MODEL,
    adapter: options.Adapter = None,
    judge_url: Annotated[
        str | None, typer.Option("--judge-url", help="An OpenAI-compatible address, to /v1.")
    ] = None,
    judge_model: Annotated[str, typer.Option("--judge-model", help="Who judges.")] = "gpt-4",
    judge_key_file: Annotated[
        Path | None, typer.Option("--judge-key-file", help="Its key; else of OPENAI_API_KEY.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder; gone on with. Else mt-bench-MODEL.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Of an answer.")] = 1024,
    workers: Annotated[int, typer.Option("--workers", help="Questions judged at once.")] = 4,
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """MT-Bench: 80 conversations of two turns, rated by a judge if there is one."""
    from minicpm_mlx.arguments import at_least_one
    from minicpm_mlx.evals.mt_bench.run import load_bench, model_of, run

    at_least_one("--max-tokens", max_tokens)
    at_least_one("--workers", workers)
    judge = _judge(judge_url, judge_model, judge_key_file)
    bench = load_bench(data)
    lm = options.load(model, dtype, device, adapter=adapter)
    who = model_of(lm)
    folder = output or Path(f"mt-bench-{who.name}")
    tell = options.progress()
    with kept(folder):
        result = run(
            bench,
            who,
            folder,
            judge=judge,
            workers=workers,
            max_tokens=max_tokens,
            progress=lambda done, of: tell(f"MT-Bench {done} of {of}" if done < of else ""),
        )
    _draw(result.scores, who.name, folder)
    if as_json:
        from dataclasses import asdict

        print(json.dumps(asdict(result), ensure_ascii=False, default=str))
        return
    for line in _rated(result.scores):
        console().print(line)
    console(stderr=True).print(result.message, style="quiet")


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Says of a run that is broken off how to go on."""
    from minicpm_mlx.errors import DownloadError, StorageError

    try:
        yield
    except (KeyboardInterrupt, DownloadError, StorageError):
        options.progress()("")
        if folder.is_dir():
            what = f"what is done is kept in {folder}; the same command goes on with it"
            console(stderr=True).print(what, style="quiet")
        raise


def _judge(url: str | None, model: str, key_file: Path | None) -> Endpoint | None:
    from minicpm_mlx.errors import InvalidArgumentError
    from minicpm_mlx.evals.mt_bench.judge_client import Endpoint, key_from

    if url is None:
        if key_file is not None:
            raise InvalidArgumentError("--judge-key-file is for --judge-url; name that too")
        return None
    return Endpoint(url, model, key_from(file=key_file), on_retry=_teller())


def _teller() -> Callable[[str], None]:
    """A line that moves at a terminal; elsewhere one that stays, once if several threads say it."""
    err, tell = console(stderr=True), options.progress()
    last = ""

    def told(why: str) -> None:
        nonlocal last
        if err.is_terminal:
            tell(f"judge: {why}")
        elif why != last:
            last = why
            err.print(f"judge: {why}", style="quiet")

    return told


def _draw(scores: BenchScores | None, name: str, folder: Path) -> None:
    """The categories around a circle, where there are ratings and matplotlib is installed."""
    from importlib.util import find_spec

    if scores is not None and scores.rated and find_spec("matplotlib") is not None:
        from minicpm_mlx.evals.mt_bench.radar_chart import draw_radar

        draw_radar({name: scores}, folder / "radar.png")


def _rated(scores: BenchScores | None) -> Iterator[str]:
    from minicpm_mlx.evals.mt_bench.run import QUESTIONS
    from minicpm_mlx.evals.report.published import MT_BENCH

    if scores is None:
        return
    if scores.mean is None:
        yield "MT-Bench: not rated"
        return
    ends = scores.interval
    within = f" ({ends.low:.2f} to {ends.high:.2f})" if ends else ""
    asked = f", {scores.questions} of its {QUESTIONS} questions"
    yield f"MT-Bench {scores.mean:.2f}{within}{asked if scores.questions < QUESTIONS else ''}"
    yield f"MiniCPM-2B, README: {MT_BENCH['MiniCPM-2B']:.2f}, judged by GPT-4"
    for number, turn in enumerate(scores.turns, start=1):
        yield f"turn {number}: " + ("not rated" if turn is None else f"{turn:.2f}")
    for name, rating in scores.categories.items():
        yield f"{name}: " + ("not rated" if rating is None else f"{rating:.2f}")
