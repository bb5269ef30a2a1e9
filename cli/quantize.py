"""`minicpm-mlx quantize`: a model in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .theme import console


def quantize(
    source: Annotated[str, typer.Argument(help="Card, folder or repository, not quantized.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    bits: Annotated[int, typer.Option("--bits", help="2, 3, 4, 5, 6 or 8.")] = 4,
    group_size: Annotated[
        int, typer.Option("--group-size", help="Weights a scale: 32, 64 or 128.")
    ] = 64,
    method: Annotated[str, typer.Option("--method", help="rtn, or gptq: slower, better.")] = "rtn",
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Text that gptq looks at, in UTF-8.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Pieces of it.")] = 32,
    length: Annotated[int, typer.Option("--length", help="Tokens a piece.")] = 512,
    seed: Annotated[int, typer.Option("--seed", help="Which pieces.")] = 0,
) -> None:
    """Write a model in fewer bits, as MLX and mlx-lm read it."""
    from dataclasses import replace

    from minicpm_mlx import quantized
    from minicpm_mlx.config_parts import Quantization
    from minicpm_mlx.errors import InvalidArgumentError
    from minicpm_mlx.loading import tokenizer_of
    from minicpm_mlx.local import folder_of, make_whole
    from minicpm_mlx.registry import resolve

    if method not in quantized.METHODS:
        raise InvalidArgumentError(
            f"--method must be one of {', '.join(quantized.METHODS)}, got {method!r}"
        )
    if bits not in (2, 3, 4, 5, 6, 8) or group_size not in (32, 64, 128):
        raise InvalidArgumentError(
            f"--bits must be 2 to 6 or 8 and --group-size 32, 64 or 128, got {bits}, {group_size}"
        )
    if (method == "gptq") != (calibration is not None):
        raise InvalidArgumentError("--method gptq and --calibration FILE go together")
    if folder.exists():
        raise InvalidArgumentError(f"{folder} exists; give a folder that does not")
    options.select(None, None)
    card = replace(resolve(source), bits=None, group_size=None)
    origin = folder_of(card)
    texts: list[list[int]] = []
    if calibration is not None:
        ids = tokenizer_of(card, origin).encode(options.text_of(calibration), add_bos=False)
        texts = quantized.samples(ids, samples, length, seed)
    err = console(stderr=True)
    make_whole(
        folder,
        lambda partial: quantized.write_quantized(
            origin,
            partial,
            Quantization(bits=bits, group_size=group_size),
            texts=texts,
            weights=card.file if card.repo else None,
            progress=lambda what: err.print(what, style="quiet"),
        ),
        "give another folder",
    )
    size = (folder / "model.safetensors").stat().st_size
    console().print(f"{folder}: {size / 1e9:.2f} GB", style="good")
