"""`minicpm-mlx bench`: tokens a second, measured as llama-bench does."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from minicpm_mlx.arguments import Limit, shown
from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.files.plots import check_chart_path
from minicpm_mlx.files.tables import markdown_table
from minicpm_mlx.model_cards import resolve

from . import options, paths
from .models import tuning
from .options import flag, option
from .render.theme import console

if TYPE_CHECKING:
    from minicpm_mlx import Config
    from minicpm_mlx.bench.measure import MeasuredModel, Work


def _check_model(name: str) -> None:
    from minicpm_mlx.bench.shapes import SHAPES

    if name not in SHAPES:
        paths.model_name(name)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class BenchOptions:
    """Options of `bench`."""

    context: typer.Context
    model: str = option(
        "As for `generate`, or a shape such as 2b-shape: random weights.",
        "--model",
        "-m",
        default=options.DEFAULT_MODEL,
        check=_check_model,
    )
    prompts: str = option(
        "Prompt lengths to read, such as 512,1024.", "--n-prompt", "-p", default="512"
    )
    gens: str = option("Numbers of tokens to generate; 0 for none.", "--n-gen", "-n", default="128")
    pairs: list[str] | None = option("Read and generate, such as 512,128.", "--pg", "-pg")
    depths: str = option(
        "Tokens already in the cache, such as 0,4096.", "--n-depth", "-d", default="0"
    )
    batches: str = option(
        "Streams at once; at a depth only their generation.", "--batch", "-b", default="1"
    )
    repetitions: int = option(
        "Runs of each test.", "--repetitions", "-r", default=5, limit=options.COUNT
    )
    first: bool = flag("Also measure seconds to the first token, cold and warm.")
    guess: bool = flag("Also quote a text, with tokens drafted ahead and without.")
    no_warmup: bool = flag("Time the first run too.")
    kv_bits: int | None = options.kv_bits()
    bandwidth: float | None = option(
        "Memory bandwidth in GB/s, for the roofline.", limit=Limit(above=0, below=math.inf)
    )
    output: str | None = option("md (default), csv, json, jsonl or sql.", "--output", "-o")
    plot: Path | None = option("Also draw a chart to this PNG file.", check=check_chart_path)
    compare: tuple[Path, Path] | None = option("Only compare two files that --json wrote.")
    predict: bool = flag("Only predict the speed of --model on Apple's chips.")
    kernels: bool = flag("With --predict: the Metal kernel of each product of a token.")
    tune: bool = flag(
        "Only measure the settings that could make --model faster; keep those that do."
    )
    compute: options.Compute
    as_json: bool = flag("Print a JSON array; the same as -o json.", "--json")

    @property
    def unmeasured(self) -> str | None:
        """The option that replaces the measurements."""
        named = {"predict": self.predict, "compare": self.compare, "tune": self.tune}
        return next((name for name, given in named.items() if given), None)


@options.command(BenchOptions)
def bench(args: BenchOptions) -> None:
    """Measure tokens a second; `--model 2b-shape` needs no download."""
    from minicpm_mlx.bench import chart, output

    format = _format(args)
    if args.unmeasured:
        _refuse_others(args.context, args.unmeasured)
        print(_unmeasured(args, format))
        return
    if args.kernels:
        raise InvalidArgumentError("--kernels goes with --predict; give both")
    works = _works(args)
    subject = _load(args)
    if args.guess and not subject.quote:
        raise InvalidArgumentError(f"--guess needs a model that can quote; {args.model} cannot")
    rows: list[dict[str, Any]] = []
    try:
        for row in _measure(subject, works, args):
            rows.append(row)
    finally:  # an interrupted run prints the rows it has
        if rows:
            print(output.FORMATS[format](rows))
    if args.plot is not None:
        chart.draw(rows, args.plot)


def _works(args: BenchOptions) -> list[Work]:
    """The tests to run; InvalidArgumentError for options that do not fit together."""
    from minicpm_mlx.bench import measure

    works = measure.works(
        prompts=_parse_numbers("--n-prompt", args.prompts, 0),
        gens=_parse_numbers("--n-gen", args.gens, 0),
        pairs=[_parse_pair(text) for text in args.pairs or ()],
        depths=_parse_numbers("--n-depth", args.depths, 0),
        batches=_parse_numbers("--batch", args.batches, 1),
        first=args.first,
        guess=args.guess,
    )
    if args.kv_bits is not None and any(work.batch > 1 for work in works):
        raise InvalidArgumentError("--kv-bits is for one stream; leave out --batch")
    return works


def _measure(
    subject: MeasuredModel, works: list[Work], args: BenchOptions
) -> Iterator[dict[str, Any]]:
    """Rows as they are measured; standard error shows each test before and after."""
    from minicpm_mlx import device
    from minicpm_mlx.bench import measure, output
    from minicpm_mlx.model.kernels import qmv_rule

    if device.on_metal() and (warning := qmv_rule.warning(device.mlx_version())):
        print(warning, file=sys.stderr)
    facts, stderr = measure.environment(subject), console(stderr=True)
    records = measure.measure(
        subject, works, repetitions=args.repetitions, warmup=not args.no_warmup
    )
    for work in works:
        if stderr.is_terminal:
            stderr.print(f"{work.name} …", style="quiet", end="\r")
        row = {**facts, **next(records).row()}
        stderr.print(f"{work.name}: {output.result(row, 'tok/s')}", style="quiet")
        yield row


def _format(args: BenchOptions) -> str:
    from minicpm_mlx.bench.output import FORMATS

    format = args.output or ("json" if args.as_json else "md")
    choices = ["md", "json"] if args.unmeasured else list(FORMATS)
    if format not in choices:
        context = f" with --{args.unmeasured}" if args.unmeasured else ""
        raise InvalidArgumentError(
            f"--output must be one of {', '.join(choices)}{context}, got {format!r}"
        )
    if args.as_json and format != "json":
        raise InvalidArgumentError(f"--json contradicts --output {format}; leave one out")
    return format


def _refuse_others(context: typer.Context, unmeasured: str) -> None:
    """InvalidArgumentError for options of a measurement where nothing is measured."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        others = {"predict": ("model", "kernels"), "tune": ("model", "device")}.get(unmeasured, ())
        applies = parameter.name in (unmeasured, "output", "as_json", *others)
        if source is not None and source.name != "DEFAULT" and not applies:
            does = "measures settings alone" if unmeasured == "tune" else "measures nothing"
            raise InvalidArgumentError(
                f"--{unmeasured} {does}, so {parameter.opts[0]} has no meaning; leave it out"
            )


def _load(args: BenchOptions) -> MeasuredModel:
    from minicpm_mlx.bench.chips import bandwidth
    from minicpm_mlx.bench.measure import PASSAGE, MeasuredModel
    from minicpm_mlx.bench.shapes import SHAPES, tuned_model
    from minicpm_mlx.device import chip

    args.compute.select()
    start, name, quote = time.perf_counter(), args.model, list[int]()
    if name in SHAPES:
        model: Any = tuned_model(name, args.compute.dtype)
    else:
        lm = options.load_model(name, args.compute, quiet=True)
        model, name = lm.model, lm.card.name
        question = f"Quote this text word for word:\n\n{PASSAGE}"
        quote = lm.encode([{"role": "user", "content": question}])
    return MeasuredModel(
        name=name,
        model=model,
        load_s=time.perf_counter() - start,
        kv_bits=args.kv_bits,
        bandwidth=bandwidth(chip()) if args.bandwidth is None else args.bandwidth,
        quote=quote,
    )


def _comparison(format: str, before: Path, after: Path) -> str:
    from minicpm_mlx.bench import output

    rows = output.compare(output.read(before), output.read(after))
    if format == "json":
        return json.dumps(rows, ensure_ascii=False, indent=2)
    lines = [
        f"| {row['model']} | {row['test']} | {row['before_s']:.3f} s | {row['after_s']:.3f} s "
        f"| {row['ratio']:.2f} ± {row['stddev']:.2f} |"
        for row in rows
    ]
    head = ["| model | test | before | after | faster |", "|---|---|---:|---:|---:|"]
    return "\n".join([*head, *lines])


def _unmeasured(args: BenchOptions, format: str) -> str:
    if args.tune:
        args.compute.select()
        return tuning.tune(args.model, format)
    if args.predict and args.kernels:
        return _kernels(args.model, format)
    if args.predict:
        return _prediction(args.model, format)
    return _comparison(format, *args.compare or ())


def _kernels(model: str, format: str) -> str:
    from minicpm_mlx.bench import products
    from minicpm_mlx.device import mlx_version
    from minicpm_mlx.model.kernels import qmv_rule

    config, mlx = _config_to_predict(model), mlx_version()
    if warning := qmv_rule.warning(mlx):
        print(warning, file=sys.stderr)
    rows = products.rows(config, mlx)
    if format == "json":
        return json.dumps(rows, indent=2)
    head = ["product", "outputs x inputs", "bits", "kernel", "a token", "of the bytes"]
    cells = [
        [
            row["product"],
            f"{row['outputs']} x {row['inputs']}",
            str(row["bits"]),
            row["kernel"],
            str(row["count"]),
            f"{row['share']:.0%}",
        ]
        for row in rows
    ]
    table = markdown_table(head, cells, text_columns=4)
    return f"{table}\n\n{products.summary(config, mlx)}"


def _prediction(model: str, format: str) -> str:
    from minicpm_mlx.bench.chips import BANDWIDTHS, MINICPM_2B, PUBLISHED, expected
    from minicpm_mlx.bench.footprint import footprint

    config, depths = _config_to_predict(model), (0, 2048, 4096)
    cost = footprint(config)
    is_2b = cost.cache == MINICPM_2B.cache and 0.98 < cost.weights / MINICPM_2B.weights < 1.02
    published, measured = PUBLISHED if is_2b else {}, _measured(model, config)
    rows = [
        {
            "chip": chip,
            "model": model,
            **{f"tg @ d{depth}": round(expected(chip, cost, depth), 1) for depth in depths},
            "mlx_lm_published": published.get(chip),
            "measured": measured.get(chip),
        }
        for chip in BANDWIDTHS
    ]
    if format == "json":
        return json.dumps(rows, indent=2)
    head = ["chip", "0 context", "2k", "4k"]
    if published:
        head.append("mlx-lm, published at 0.6k")
    if measured:
        head.append("measured, short context")
    columns = [f"tg @ d{depth}" for depth in depths]
    columns += ["mlx_lm_published"] * bool(published) + ["measured"] * bool(measured)
    cells = [
        [str(row["chip"]), *(f"{row[name]:.0f}" if row[name] else "" for name in columns)]
        for row in rows
    ]
    bits = config.quantization.bits if config.quantization else 16
    return (
        f"Expected, not measured: tokens/s of {model} in {bits} bits, one stream, 16-bit cache.\n"
        f"A token reads {cost.weights / 1e9:.2f} GB of weights and {cost.cache / 1024:.0f} KiB for "
        f"each token of context, in {cost.kernels} kernels.\n\n{markdown_table(head, cells)}"
    )


def _measured(model: str, config: Config) -> dict[str, float]:
    """Tokens/s that users measured, by chip; random weights of a card's shape in 4 bits count."""
    from minicpm_mlx.bench.measured import measured_decode, measured_rows
    from minicpm_mlx.bench.shapes import PACKING, SHAPES

    names = {model}
    if model not in SHAPES and config.quantization == PACKING and (shape := resolve(model).shape):
        names.add(shape)
    decodes = measured_decode(measured_rows(), names)
    return {chip: float(row["avg_ts"]) for chip, row in decodes.items()}


def _config_to_predict(model: str) -> Config:
    """The config of a shape in 4 bits, or by which a card's model runs."""
    from minicpm_mlx.bench.forecast import known_config
    from minicpm_mlx.bench.shapes import SHAPES, packed_config

    config = packed_config(model) if model in SHAPES else known_config(resolve(model))
    if config is None:
        raise InvalidArgumentError(
            f"{shown(model)} is not on this disk, and no card tells its shape; give a card with "
            f"one (minicpm-mlx list), or one of {', '.join(SHAPES)}"
        )
    return config


def _parse_numbers(option: str, text: str, least: int) -> list[int]:
    """Whole numbers separated by commas."""
    numbers = [number.strip() for number in text.split(",")]
    if not all(n.isdecimal() and len(n) < 10 and int(n) >= least for n in numbers):
        raise InvalidArgumentError(
            f"{option} must be whole numbers from {least} to 999999999, such as 128,512; "
            f"got {shown(text)}"
        )
    return [int(number) for number in numbers]


def _parse_pair(text: str) -> tuple[int, int]:
    numbers = _parse_numbers("--pg", text, 1)
    if len(numbers) != 2:
        raise InvalidArgumentError(f"--pg takes two numbers, such as 512,128; got {text!r}")
    return numbers[0], numbers[1]
