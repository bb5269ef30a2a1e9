"""`minicpm-mlx convert`: a model in another format."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.loading.store import folder_of
from minicpm_mlx.model_cards import resolve

from .. import options, paths
from ..options import argument, flag, option
from ..render.theme import console
from ..streams import progress

if TYPE_CHECKING:
    from minicpm_mlx.weights.llama_format import Scales


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ConvertOptions:
    """Arguments and options of `convert`."""

    source: options.Source
    destination: Path = argument(
        "Folder (or .gguf file) to write; it must not exist.", check=paths.new_path
    )
    format: str | None = option(
        "mup, llama (OpenBMB's), mlx (for mlx-lm) or gguf; default: mlx, or gguf for a .gguf file."
    )
    dtype: str | None = option("float32, bfloat16 or float16; default: as stored.")
    dequantize: bool = flag("Write quantized matrices dense.")
    gguf_type: str | None = option(
        "Of gguf: F32, F16 (default), BF16, Q8_0, Q4_0 or Q4_1.", "--type"
    )
    scale_emb: float | None = option(
        "From llama: MiniCPM's constant, 12; default: as `convert` recorded it."
    )
    scale_depth: float | None = option("From llama: likewise, 1.4.")
    dim_model_base: int | None = option("From llama: likewise, 256.")

    @property
    def target_format(self) -> str:
        return self.format or ("gguf" if self.destination.suffix.lower() == ".gguf" else "mlx")

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
    from minicpm_mlx.convert import checkpoint

    destination, scales = args.destination, args.scales()
    format, dtype, gguf_type = args.target_format, args.dtype, args.gguf_type
    checkpoint.check(destination, format=format, dtype=dtype, gguf_type=gguf_type)
    options.Compute().select()
    card = replace(resolve(args.source), bits=None, group_size=None)
    show = progress()
    written = checkpoint.convert(
        folder_of(card),
        destination,
        format=format,
        dtype=dtype,
        gguf_type=gguf_type,
        dequantize=args.dequantize,
        scales=scales,
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
    if written.left_dense:
        console(stderr=True).print(
            f"left in F16: {written.left_dense} matrices whose rows divide into no blocks of 32",
            style="quiet",
            highlight=False,
        )
    if written.scale_error:
        console(stderr=True).print(
            f"scales were rounded to float16, by up to {written.scale_error:.1e} of the largest "
            "in their matrix: GGUF's blocks hold no more",
            style="quiet",
            highlight=False,
        )
