"""`minicpm-mlx convert`: a model in another format."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .. import options
from ..render.theme import console


def convert(
    source: Annotated[str, typer.Argument(help="Card, folder, repository or .gguf file.")],
    destination: Annotated[
        Path, typer.Argument(help="Folder (or .gguf file) to write; it must not exist.")
    ],
    format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="mup, llama (OpenBMB's), mlx (for mlx-lm) or gguf; by default mlx, or gguf for a "
            ".gguf file.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, bfloat16 or float16; by default as stored."),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write packed matrices dense.")
    ] = False,
    gguf_type: Annotated[
        str | None,
        typer.Option("--type", help="Of gguf: F32, F16 (default), BF16, Q8_0, Q4_0 or Q4_1."),
    ] = None,
    scale_emb: Annotated[
        float | None, typer.Option("--scale-emb", help="From llama: MiniCPM's constant, 12.")
    ] = None,
    scale_depth: Annotated[
        float | None, typer.Option("--scale-depth", help="From llama: likewise, 1.4.")
    ] = None,
    dim_model_base: Annotated[
        int | None, typer.Option("--dim-model-base", help="From llama: likewise, 256.")
    ] = None,
) -> None:
    """Write a model in another format, its tokenizer along with it."""
    from dataclasses import replace

    from minicpm_mlx.convert.checkpoint import convert as convert_folder
    from minicpm_mlx.errors import InvalidArgumentError
    from minicpm_mlx.loading.store import folder_of
    from minicpm_mlx.model_cards import resolve
    from minicpm_mlx.weights.llama_format import Scales

    scales = None
    if scale_emb is not None and scale_depth is not None and dim_model_base is not None:
        scales = Scales(scale_emb=scale_emb, scale_depth=scale_depth, dim_model_base=dim_model_base)
    elif (scale_emb, scale_depth, dim_model_base) != (None, None, None):
        raise InvalidArgumentError("--scale-emb, --scale-depth and --dim-model-base go together")
    if format is None:
        format = "gguf" if destination.suffix.lower() == ".gguf" else "mlx"
    options.new_folder(destination)  # before anything is downloaded
    options.select(None, None)
    card = replace(resolve(source), bits=None, group_size=None)
    tell = options.progress()
    written = convert_folder(
        folder_of(card),
        destination,
        format=format,
        dtype=dtype,
        dequantize=dequantize,
        scales=scales,
        gguf_type=gguf_type,
        card=card,
        progress=tell,
    )
    tell("")
    files = [destination] if destination.is_file() else destination.iterdir()
    size = sum(path.stat().st_size for path in files)
    console().print(f"{destination}: {size / 1e9:.2f} GB", style="good")
    if written is not None:
        console().print(
            f"for Ollama: ollama create NAME -f {shlex.quote(str(written.modelfile))}",
            highlight=False,
        )
        if written.scale_error:
            console(stderr=True).print(
                f"scales were rounded to float16, by up to {written.scale_error:.1e} of the "
                "largest in their matrix: that is all GGUF's blocks hold",
                style="quiet",
                highlight=False,
            )
