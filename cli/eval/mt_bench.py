"""`minicpm-mlx eval mt-bench`: conversations of two turns, rated by a judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm_mlx.errors import InvalidArgumentError

from .. import options, paths
from ..options import REQUIRED, option
from ..render.theme import console
from ..streams import print_json, progress, resumable

if TYPE_CHECKING:
    from minicpm_mlx.evals.mt_bench.judge_client import Endpoint
    from minicpm_mlx.evals.mt_bench.run import BenchScores


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class MTBenchOptions:
    """Options of `eval mt-bench`."""

    data: Path = option(
        "FastChat's llm_judge/data/mt_bench.", default=REQUIRED, check=paths.input_folder
    )
    model: options.BaseModel = None
    adapter: options.Adapter = None
    judge_url: str | None = option("OpenAI-compatible address, up to /v1.")
    judge_model: str = option("Model that judges.", default="gpt-4")
    judge_key_file: Path | None = option(
        "File with its key; default: OPENAI_API_KEY.", check=paths.input_file
    )
    output: Path | None = option(
        "Folder, resumed if it exists; default: mt-bench-MODEL.", check=paths.output_folder
    )
    max_tokens: int = option("Longest answer, in tokens.", default=1024, limit=options.COUNT)
    workers: int = option("Questions judged at once.", default=4, limit=options.COUNT)
    compute: options.Compute
    as_json: options.Json = False


@options.may_download
@options.command(MTBenchOptions)
def mt_bench(args: MTBenchOptions) -> None:
    """MT-Bench: 80 conversations of two turns, rated by a judge if there is one."""
    from minicpm_mlx.evals.mt_bench.questions import load_bench
    from minicpm_mlx.evals.mt_bench.run import model_of, run

    judge = _judge(args)
    bench = load_bench(args.data)
    model = model_of(options.load_model(args.model, args.compute, adapter=args.adapter))
    folder = args.output or Path(f"mt-bench-{model.name}")
    show = progress()
    with resumable(lambda: folder):
        result = run(
            bench,
            model,
            folder,
            judge=judge,
            workers=args.workers,
            max_tokens=args.max_tokens,
            progress=lambda done, of: show(f"MT-Bench {done} of {of}" if done < of else ""),
        )
    _draw(result.scores, model.name, folder)
    if args.as_json:
        print_json(asdict(result))
        return
    for line in _scores(result.scores, model.published):
        console().print(line)
    console(stderr=True).print(result.message, style="quiet")


def _judge(args: MTBenchOptions) -> Endpoint | None:
    from minicpm_mlx.evals.mt_bench.judge_client import Endpoint, key_from

    if args.judge_url is None:
        if args.judge_key_file is not None:
            raise InvalidArgumentError("--judge-key-file is for --judge-url; name that too")
        return None
    key = key_from(file=args.judge_key_file)
    return Endpoint(args.judge_url, args.judge_model, key, on_retry=_show_delay())


def _show_delay() -> Callable[[str], None]:
    """A line that moves at a terminal; elsewhere one that stays, once if several threads say it."""
    stderr, show = console(stderr=True), progress()
    last = ""

    def update(reason: str) -> None:
        nonlocal last
        if stderr.is_terminal:
            show(f"judge: {reason}")
        elif reason != last:
            last = reason
            stderr.print(f"judge: {reason}", style="quiet")

    return update


def _draw(scores: BenchScores | None, name: str, folder: Path) -> None:
    """The categories around a circle, where there are ratings and matplotlib is installed."""
    from importlib.util import find_spec

    if scores is not None and scores.rated and find_spec("matplotlib") is not None:
        from minicpm_mlx.evals.mt_bench.radar_chart import draw_radar

        draw_radar({name: scores}, folder / "radar.png")


def _scores(scores: BenchScores | None, published: float | None) -> Iterator[str]:
    from minicpm_mlx.evals.mt_bench.run import QUESTIONS

    if scores is None:
        return
    if scores.mean is None:
        yield "MT-Bench: not rated"
        return
    interval = scores.interval
    line = f"MT-Bench {scores.mean:.2f}"
    line += f" ({interval.low:.2f} to {interval.high:.2f})" if interval else ""
    if scores.questions < QUESTIONS:
        line += f", {scores.questions} of its {QUESTIONS} questions"
    yield line
    if published is not None:
        yield f"MiniCPM-2B, README: {published:.2f}, judged by GPT-4"
    for number, turn in enumerate(scores.turns, start=1):
        yield f"turn {number}: " + ("not rated" if turn is None else f"{turn:.2f}")
    for name, rating in scores.categories.items():
        yield f"{name}: " + ("not rated" if rating is None else f"{rating:.2f}")
