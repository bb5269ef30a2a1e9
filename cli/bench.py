"""`minicpm-mlx bench`: tokens a second, measured as llama-bench does."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .render.theme import console

if TYPE_CHECKING:
    from minicpm_mlx.bench.measure import MeasuredModel, Work


def bench(
    context: typer.Context,
    model: options.Model = options.DEFAULT_MODEL,
    prompts: Annotated[
        str, typer.Option("--n-prompt", "-p", help="Prompt lengths to read, such as 512,1024.")
    ] = "512",
    gens: Annotated[
        str, typer.Option("--n-gen", "-n", help="Numbers of tokens to make; 0 for none.")
    ] = "128",
    pairs: Annotated[
        list[str] | None, typer.Option("--pg", "-pg", help="Read and make, such as 512,128.")
    ] = None,
    depths: Annotated[
        str, typer.Option("--n-depth", "-d", help="Tokens already in the cache, such as 0,4096.")
    ] = "0",
    batches: Annotated[
        str, typer.Option("--batch", "-b", help="Streams at once; at depths, their making alone.")
    ] = "1",
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", help="Of each test.")] = 5,
    first: Annotated[
        bool, typer.Option("--first", help="Also seconds to the first token, cold and warm.")
    ] = False,
    guess: Annotated[
        bool, typer.Option("--guess", help="Also quoting a text, with guesses ahead and without.")
    ] = False,
    no_warmup: Annotated[bool, typer.Option("--no-warmup", help="Time the first run too.")] = False,
    kv_bits: Annotated[
        int | None, typer.Option("--kv-bits", help="Keep the cache in 8 or 4 bits.")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option("--bandwidth", help="GB/s of the memory, for the roofline.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="md (default), csv, json, jsonl or sql.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw a chart: a PNG file.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", help="Only compare two files that --json wrote."),
    ] = None,
    predict: Annotated[
        bool, typer.Option("--predict", help="Only say what to expect of Apple's chips.")
    ] = False,
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON array; the same as -o json.")
    ] = False,
) -> None:
    """Measure tokens a second; `--model 2b-shape` needs no download."""
    from minicpm_mlx.arguments import at_least_one
    from minicpm_mlx.bench import chart, measure
    from minicpm_mlx.bench import output as formats
    from minicpm_mlx.bench.chips import bandwidth as bandwidth_of
    from minicpm_mlx.device import chip
    from minicpm_mlx.errors import InvalidArgumentError
    from minicpm_mlx.files.plots import check_chart_path

    unmeasured = "predict" if predict else "compare" if compare else None
    kind = _format(output, as_json, unmeasured)
    if unmeasured:
        _refuse_others(context, unmeasured)
        print(_predicted(kind) if predict else _compared(kind, *compare or ()))
        return
    at_least_one("repetitions", repetitions)
    todo = measure.works(
        prompts=_numbers("--n-prompt", prompts, 0),
        gens=_numbers("--n-gen", gens, 0),
        pairs=[_pair(text) for text in pairs or ()],
        depths=_numbers("--n-depth", depths, 0),
        batches=_numbers("--batch", batches, 1),
        first=first,
        guess=guess,
    )
    if kv_bits not in (None, 4, 8):
        raise InvalidArgumentError(f"--kv-bits must be 8 or 4, got {kv_bits}")
    if kv_bits is not None and any(work.batch > 1 for work in todo):
        raise InvalidArgumentError("--kv-bits is for one stream; leave out --batch")
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise InvalidArgumentError(f"--bandwidth must be GB/s above 0, got {bandwidth}")
    if plot is not None:
        check_chart_path(plot)
    subject = _loaded(model, dtype, device, kv_bits, bandwidth)
    if guess and not subject.quote:
        raise InvalidArgumentError(f"--guess needs a model that can quote; {model} cannot")
    if subject.bandwidth is None:
        subject = replace(subject, bandwidth=bandwidth_of(chip()))
    rows: list[dict[str, Any]] = []
    try:
        for row in _measured(subject, todo, repetitions, not no_warmup):
            rows.append(row)
    finally:  # what was measured is printed, also when the rest is broken off
        if rows:
            print(formats.FORMATS[kind](rows))
    if plot is not None:
        chart.draw(rows, plot)


def _measured(
    subject: MeasuredModel, todo: list[Work], repetitions: int, warmup: bool
) -> Iterator[dict[str, Any]]:
    """Rows as they are measured, each told on standard error before and after."""
    from minicpm_mlx.bench import measure
    from minicpm_mlx.bench import output as formats

    facts, err = measure.environment(subject), console(stderr=True)
    records = measure.measure(subject, todo, repetitions=repetitions, warmup=warmup)
    for work in todo:
        if err.is_terminal:
            err.print(f"{work.name} …", style="quiet", end="\r")
        row = {**facts, **next(records).row()}
        err.print(f"{work.name}: {formats.result(row, 'tok/s')}", style="quiet")
        yield row


def _format(output: str | None, as_json: bool, unmeasured: str | None) -> str:
    from minicpm_mlx.bench import output as formats
    from minicpm_mlx.errors import InvalidArgumentError

    kind = output or ("json" if as_json else "md")
    known = ["md", "json"] if unmeasured else list(formats.FORMATS)
    if kind not in known:
        where = f" with --{unmeasured}" if unmeasured else ""
        raise InvalidArgumentError(
            f"--output must be one of {', '.join(known)}{where}, got {kind!r}"
        )
    if as_json and kind != "json":
        raise InvalidArgumentError(f"--json contradicts --output {kind}; leave one out")
    return kind


def _refuse_others(context: typer.Context, unmeasured: str) -> None:
    """Refuse options that say what to measure, and how, where nothing is measured."""
    from minicpm_mlx.errors import InvalidArgumentError

    for option in context.command.params:
        given = context.get_parameter_source(option.name or "")
        honoured = option.name in (unmeasured, "output", "as_json")
        if given is not None and given.name != "DEFAULT" and not honoured:
            raise InvalidArgumentError(
                f"--{unmeasured} measures nothing, so {option.opts[0]} has no meaning; leave it out"
            )


def _loaded(
    name: str, dtype: str | None, device: str | None, kv_bits: int | None, bandwidth: float | None
) -> MeasuredModel:
    from minicpm_mlx.bench.measure import PASSAGE, MeasuredModel
    from minicpm_mlx.bench.shapes import SHAPES, random_model

    options.select(dtype, device)
    start, quote = time.perf_counter(), list[int]()
    if name in SHAPES:
        found: Any = random_model(name, dtype)
    else:
        lm = options.load(name, dtype, device, quiet=True)
        found, name = lm.model, lm.card.name
        question = f"Quote this text word for word:\n\n{PASSAGE}"
        quote = lm.encode([{"role": "user", "content": question}])
    return MeasuredModel(
        name=name,
        model=found,
        load_s=time.perf_counter() - start,
        kv_bits=kv_bits,
        bandwidth=bandwidth,
        quote=quote,
    )


def _compared(kind: str, before: Path, after: Path) -> str:
    import json

    from minicpm_mlx.bench import output as formats

    found = formats.compare(formats.read(before), formats.read(after))
    if kind == "json":
        return json.dumps(found, ensure_ascii=False, indent=2)
    lines = ["| model | test | before | after | faster |", "|---|---|---:|---:|---:|"]
    for row in found:
        lines.append(
            f"| {row['model']} | {row['test']} | {row['before_s']:.3f} s | {row['after_s']:.3f} s "
            f"| {row['ratio']:.2f} ± {row['stddev']:.2f} |"
        )
    return "\n".join(lines)


def _predicted(kind: str) -> str:
    import json

    from minicpm_mlx.bench.chips import BANDWIDTHS, MINICPM_2B, PUBLISHED, expected

    depths = (0, 2048, 4096)
    found = [
        {
            "chip": chip,
            **{f"tg @ d{depth}": round(expected(chip, MINICPM_2B, depth), 1) for depth in depths},
            "mlx_lm_published": PUBLISHED.get(chip),
        }
        for chip in BANDWIDTHS
    ]
    if kind == "json":
        return json.dumps(found, indent=2)
    lines = [
        "Expected, not measured: tokens/s of MiniCPM-2B in 4 bits, one stream, 16-bit cache.",
        "",
        "| chip | 0 context | 2k | 4k | mlx-lm, published at 0.6k |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in found:
        cells = [f"{row[f'tg @ d{depth}']:.0f}" for depth in depths]
        told = f"{row['mlx_lm_published']:.0f}" if row["mlx_lm_published"] else ""
        lines.append(f"| {row['chip']} | {' | '.join(cells)} | {told} |")
    return "\n".join(lines)


def _numbers(option: str, text: str, least: int) -> list[int]:
    """Whole numbers with commas between them."""
    from minicpm_mlx.arguments import shown
    from minicpm_mlx.errors import InvalidArgumentError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 and int(part) >= least for part in parts):
        raise InvalidArgumentError(
            f"{option} must be whole numbers from {least} to 999999999, such as 128,512; "
            f"got {shown(text)}"
        )
    return [int(part) for part in parts]


def _pair(text: str) -> tuple[int, int]:
    from minicpm_mlx.errors import InvalidArgumentError

    numbers = _numbers("--pg", text, 1)
    if len(numbers) != 2:
        raise InvalidArgumentError(f"--pg takes two numbers, such as 512,128; got {text!r}")
    return numbers[0], numbers[1]
