"""`minicpm-mlx bench`: tokens a second, measured as llama-bench does."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .theme import console

if TYPE_CHECKING:
    from minicpm_mlx.bench.measure import Model


def bench(
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
        str, typer.Option("--output", "-o", help="md, csv, json, jsonl or sql.")
    ] = "md",
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
    as_json: options.Json = False,
) -> None:
    """Measure tokens a second; `--model 2b-shape` needs no download."""
    from minicpm_mlx.arguments import at_least_one
    from minicpm_mlx.bench import formats, measure
    from minicpm_mlx.bench.chips import bandwidth as bandwidth_of
    from minicpm_mlx.device import chip
    from minicpm_mlx.errors import InvalidArgumentError

    kind = "json" if as_json else output
    if kind not in formats.FORMATS:
        raise InvalidArgumentError(f"--output must be one of {', '.join(formats.FORMATS)}")
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
    if kv_bits is not None and any(work.batch > 1 for work in todo):
        raise InvalidArgumentError("--kv-bits is for one stream; leave out --batch")
    if predict or compare:
        print(_predicted(kind) if predict else _compared(kind, *compare or ()))
        return
    subject = _loaded(model, dtype, device, kv_bits, bandwidth)
    if guess and not subject.quote:
        raise InvalidArgumentError(f"--guess needs a model that can quote; {model} cannot")
    if subject.bandwidth is None:
        subject = replace(subject, bandwidth=bandwidth_of(chip()))
    facts = measure.environment(subject)
    rows: list[dict[str, Any]] = []
    for record in measure.measure(subject, todo, repetitions=repetitions, warmup=not no_warmup):
        rows.append({**facts, **record.row()})
        console(stderr=True).print(f"{rows[-1]['test']}: {rows[-1]['avg_ts']} tok/s", style="quiet")
    print(formats.FORMATS[kind](rows))
    if plot is not None:
        formats.plot(rows, plot)


def _loaded(
    name: str, dtype: str | None, device: str | None, kv_bits: int | None, bandwidth: float | None
) -> Model:
    from minicpm_mlx.bench.measure import PASSAGE, Model
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
    return Model(
        name=name,
        model=found,
        load_s=time.perf_counter() - start,
        kv_bits=kv_bits,
        bandwidth=bandwidth,
        quote=quote,
    )


def _compared(kind: str, before: Path, after: Path) -> str:
    import json

    from minicpm_mlx.bench import formats

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
    from minicpm_mlx.errors import InvalidArgumentError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise InvalidArgumentError(
            f"{option} must be whole numbers from {least} on, such as 128,512; got {text!r}"
        )
    return [int(part) for part in parts]


def _pair(text: str) -> tuple[int, int]:
    from minicpm_mlx.errors import InvalidArgumentError

    numbers = _numbers("--pg", text, 1)
    if len(numbers) != 2:
        raise InvalidArgumentError(f"--pg takes two numbers, such as 512,128; got {text!r}")
    return numbers[0], numbers[1]
