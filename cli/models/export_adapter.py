"""`minicpm-mlx export-adapter`: an adapter for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options, paths
from ..render.theme import console


def export_adapter(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder of a LoRA or DoRA adapter.", callback=paths.checked(paths.adapter_folder)
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            help="Folder to write, or .gguf file; must not exist.",
            callback=paths.checked(paths.new_path),
        ),
    ],
    layout: Annotated[
        str, typer.Option("--format", help="peft, mlx (mlx-lm), or gguf (llama.cpp --lora).")
    ],
    model: options.BaseModel = None,
    base_format: Annotated[
        str | None,
        typer.Option(
            help="Make it for a base in this format of `convert`: mup, llama or mlx; default: that "
            "of the model."
        ),
    ] = None,
) -> None:
    """Write an adapter in the layout of PEFT, mlx-lm or llama.cpp."""
    from minicpm_mlx.convert import export_adapter as export

    base = options.choose_model(model, [folder])
    form = export.export_adapter(folder, target, layout, model=base, base_format=base_format)
    console().print(f"{target}: written for {layout}", style="good")
    console().print(f"for a base in {form}", highlight=False)
