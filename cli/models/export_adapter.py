"""`minicpm-mlx export-adapter`: an adapter for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import options, paths
from ..options import REQUIRED, argument, option
from ..render.theme import console


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ExportOptions:
    """Arguments and options of `export-adapter`."""

    folder: Path = argument("Folder of a LoRA or DoRA adapter.", check=paths.adapter_folder)
    target: Path = argument("Folder to write, or .gguf file; must not exist.", check=paths.new_path)
    format: str = option("peft, mlx (mlx-lm), or gguf (llama.cpp --lora).", default=REQUIRED)
    model: options.BaseModel = None
    base_format: str | None = option(
        "Make it for a base in this format of `convert`: mup, llama or mlx; default: the model's."
    )


@options.command(ExportOptions)
def export_adapter(args: ExportOptions) -> None:
    """Write an adapter in the layout of PEFT, mlx-lm or llama.cpp."""
    from minicpm_mlx.convert import export_adapter as export

    export.check(args.target, args.format, args.base_format)
    model = options.choose_model(args.model, [args.folder])
    form = export.export_adapter(
        args.folder, args.target, args.format, model=model, base_format=args.base_format
    )
    console().print(f"{args.target}: written for {args.format}", style="good")
    console().print(f"for a base in {form}", highlight=False)
