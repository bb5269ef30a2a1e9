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
    model: options.Model = options.DEFAULT_MODEL,
) -> None:
    """Write an adapter in the layout of PEFT, mlx-lm or llama.cpp."""
    from minicpm_mlx.convert import export_adapter as export

    export.export_adapter(folder, target, layout, model=model)
    console().print(f"{target}: written for {layout}", style="good")
