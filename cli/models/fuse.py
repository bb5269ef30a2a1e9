"""`minicpm-mlx fuse`: an adapter merged into a model's weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .. import options
from ..render.theme import console


def fuse(
    source: Annotated[str, typer.Argument(help="Card, folder or repository, as for --model.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    adapter: Annotated[Path, typer.Option("--adapter", help="Folder of a LoRA or DoRA adapter.")],
    text: Annotated[
        Path | None, typer.Option("--text", help="What to check on, in UTF-8; else a few lines.")
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Write the changed matrices dense.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write even where rounding lost the change.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Write a model with an adapter in its weights, in the bits it has, and check the change."""
    from minicpm_mlx.convert.merge_adapter import fuse_adapter

    words = None if text is None else options.text_of(text)
    options.new_folder(folder)
    options.select(None, None)
    tell = options.progress()
    found = fuse_adapter(
        source,
        folder,
        adapter,
        text=words,
        dequantize=dequantize,
        force=force,
        progress=tell,
    )
    tell("")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if as_json:
        print(json.dumps({"folder": str(folder), "bytes": size} | asdict(found)))
        return
    out = console()
    out.print(f"{folder}: {size / 1e9:.2f} GB", style="good", highlight=False)
    out.print(
        f"against the adapter on the base, {found.tokens} tokens: KL {found.kl:.2g}; "
        f"of the base without it {found.kl_base:.2g}",
        highlight=False,
    )
    if found.unknown:
        console(stderr=True).print(
            "the adapter changes so little that nothing can be said of what survived",
            style="warning",
        )
