"""`minicpm-mlx convert`: a model in another format."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.loading.store import folder_of
from minicpm_mlx.model_cards import resolve

from .. import options
from ..options import argument, flag, option
from ..render.theme import console
from ..streams import check_new_folder, progress

if TYPE_CHECKING:
    from minicpm_mlx.weights.llama_format import Scales


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ConvertOptions:
    """Arguments and options of `convert`."""

    source: options.Source
    destination: Path = argument("Folder (or .gguf file) to write; it must not exist.")
    format: str | None = option(
        "mup, llama (OpenBMB's), mlx (for mlx-lm) or gguf; default: mlx, or gguf for a .gguf file."
    )
    dtype: str | None = option("float32, bfloat16 or float16; default: as stored.")
    dequantize: bool = flag("Write quantized matrices dense.")
    gguf_type: str | None = option(
        "Of gguf: F32, F16 (default), BF16, Q8_0, Q4_0 or Q4_1.", "--type"
    )
    scale_emb: float | None = option("From llama: MiniCPM's constant, 12.")
    scale_depth: float | None = option("From llama: likewise, 1.4.")
    dim_model_base: int | None = option("From llama: likewise, 256.")

    def scales(self) -> Scales | None:
        from minicpm_mlx.weights.llama_format import Scales

        emb, depth, base = self.scale_emb, self.scale_depth, self.dim_model_base
        if emb is not None and depth is not None and base is not None:
            return Scales(scale_emb=emb, scale_depth=depth, dim_model_base=base)
        if (emb, depth, base) == (None, None, None):
            return None
        raise InvalidArgumentError("--scale-emb, --scale-depth and --dim-model-base go together")


@options.command(ConvertOptions)
def convert(args: ConvertOptions) -> None:
    """Write a model and its tokenizer in another format."""
    from minicpm_mlx.convert.checkpoint import convert as convert_folder
    from minicpm_mlx.weights.gguf.package import library

    destination, scales = args.destination, args.scales()
    check_new_folder(destination)  # before anything is downloaded
    format = args.format or ("gguf" if destination.suffix.lower() == ".gguf" else "mlx")
    if format == "gguf":
        library()
    options.Compute().select()
    card = replace(resolve(args.source), bits=None, group_size=None)
    show = progress()
    written = convert_folder(
        folder_of(card),
        destination,
        format=format,
        dtype=args.dtype,
        dequantize=args.dequantize,
        scales=scales,
        gguf_type=args.gguf_type,
        card=card,
        progress=show,
    )
    show("")
    files = [destination] if destination.is_file() else destination.iterdir()
    size = sum(path.stat().st_size for path in files)
    console().print(f"{destination}: {size / 1e9:.2f} GB", style="good")
    if written is None:
        return
    command = f"ollama create NAME -f {shlex.quote(str(written.modelfile))}"
    console().print(f"for Ollama: {command}", highlight=False)
    if written.scale_error:
        console(stderr=True).print(
            f"scales were rounded to float16, by up to {written.scale_error:.1e} of the largest "
            "in their matrix: GGUF's blocks hold no more",
            style="quiet",
            highlight=False,
        )
