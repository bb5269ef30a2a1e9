"""Converts a checkpoint to another format: MiniCPM's own (mup), Llama's, mlx-lm's, or GGUF.

Tensors are computed as their shard is written, so memory stays at one shard. A destination appears
whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..arguments import one_of
from ..device import as_dtype
from ..errors import InvalidArgumentError
from ..files.atomic import check_writable, make_whole
from ..model_cards import Card
from ..weights.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from ..weights.companion_files import copy_companion_files
from ..weights.gguf import KINDS, GgufReport, write_gguf
from ..weights.gguf.package import library
from ..weights.lazy_ops import cast, dense
from ..weights.lazy_tensor import dtype_name, is_float
from ..weights.llama_format import Scales, fold, fold_tied, unfold

FORMATS = ("mup", "llama", "mlx", "gguf")
"""MiniCPM's own names and constants; a LlamaForCausalLM with a head of its own, as OpenBMB folds
it; a LlamaForCausalLM as small as the source, for mlx-lm; and llama.cpp's file."""

SHARD = 2 << 30
"""Most bytes of tensors in a file, and so roughly the memory that a conversion takes."""

Progress = Callable[[str], object]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    format: str = "mlx",
    dtype: str | mx.Dtype | None = None,
    dequantize: bool = False,
    scales: Scales | None = None,
    gguf_type: str | None = None,
    card: Card | None = None,
    shard: int = SHARD,
    progress: Progress = lambda _: None,
) -> GgufReport | None:
    """Write the model in the folder `source` in another format to `destination`, a new folder.

    `format` is one of FORMATS. `dtype` ("float32", "bfloat16", "float16", or MLX's) is that of all
    floats, the scales of packed matrices among them; by default each keeps its own, and products
    are rounded to it once. `dequantize` writes packed matrices dense. `scales` are the constants of
    the MiniCPM that a llama folder was made from, needed where it is to be one again and its config
    does not record them. `gguf_type`, for gguf alone, is one of `weights.gguf.KINDS` (default F16),
    and `destination` may be a .gguf file. `card` knows the model's template, end tokens and file.
    `shard` is the size of a file in bytes. For gguf, a report on the tensors is returned.

    Raises InvalidArgumentError for what the format cannot express and for a `destination` that
    exists, WeightsError for what `dtype` cannot hold, and what `read_checkpoint` raises.
    """
    source, destination = Path(source), Path(destination)
    check(destination, format=format, dtype=dtype, gguf_type=gguf_type)
    checkpoint = read_checkpoint(source, card.file if card and card.repo else None)
    result = converted(checkpoint, format, dtype=dtype, dequantize=dequantize, scales=scales)
    if format == "gguf":
        return _write_gguf(result, source, destination, gguf_type or "F16", progress)

    def make(folder: Path) -> None:
        write_checkpoint(result, folder, shard=shard, progress=progress)
        copy_companion_files(source, folder, card, code=format == "mup", for_mlx_lm=format == "mlx")

    make_whole(destination, make, "give another folder")
    return None


def converted(
    checkpoint: Checkpoint,
    format: str,
    *,
    dtype: str | mx.Dtype | None = None,
    dequantize: bool = False,
    scales: Scales | None = None,
) -> Checkpoint:
    """The checkpoint in another format; see `convert`. Nothing is computed before it is loaded."""
    if dequantize:
        checkpoint = dense(checkpoint)
    config = checkpoint.config
    is_llama = config.dim_model_base is None  # a MiniCPM has it, stated or by default
    if format == "mup" and scales is None and (folded := config.mup_folded):
        scales = Scales(
            scale_emb=folded.scale_emb,
            scale_depth=folded.scale_depth,
            dim_model_base=folded.dim_model_base,
        )
    if is_llama and scales is not None:
        checkpoint = unfold(checkpoint, scales)
    elif is_llama and format == "mup":
        raise InvalidArgumentError(
            "format mup: this is a Llama; say what it was folded with, for the published models "
            "--scale-emb 12 --scale-depth 1.4 --dim-model-base 256"
        )
    elif scales is not None:
        raise InvalidArgumentError(
            "--scale-emb, --scale-depth and --dim-model-base are for a llama folder; this "
            "MiniCPM's config.json states its own"
        )
    if format in ("llama", "mlx"):
        checkpoint = fold(checkpoint) if format == "llama" else fold_tied(checkpoint)
    if dtype is not None:
        checkpoint = cast(checkpoint, as_dtype(dtype))
    return replace(checkpoint, raw=checkpoint.raw | _stored_dtype(checkpoint))


def check(
    destination: Path,
    *,
    format: str,
    dtype: str | mx.Dtype | None = None,
    gguf_type: str | None = None,
) -> None:
    """Raises as `convert` for arguments that no source could have."""
    if format == "gguf" and dtype is not None:
        raise InvalidArgumentError(
            "format gguf: --type says how its matrices are held, not --dtype"
        )
    if format != "gguf" and gguf_type is not None:
        raise InvalidArgumentError(f"--type is for format gguf, got format {format!r}")
    for name, value, choices in (
        ("format", format, FORMATS),
        ("gguf_type", gguf_type, KINDS),
    ):
        if value is not None:
            one_of(name, value, choices)
    if dtype is not None:
        as_dtype(dtype)
    if format == "gguf":
        library()
    if format != "gguf" and destination.suffix.lower() == ".gguf":
        raise InvalidArgumentError(
            f"{destination}: format {format} is a folder; expected format gguf, or another name"
        )
    if destination.exists():
        raise InvalidArgumentError(f"{destination} exists; give a folder that does not")
    check_writable(destination, "give another place")


def _stored_dtype(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json's torch_dtype: that of the embedding, or of its scales."""
    tensors, name = checkpoint.tensors, "model.embed_tokens"
    dtype = tensors.get(f"{name}.scales", tensors[f"{name}.weight"]).dtype
    return {"torch_dtype": dtype_name(dtype)} if is_float(dtype) else {}


def _write_gguf(
    checkpoint: Checkpoint, source: Path, destination: Path, kind: str, progress: Progress
) -> GgufReport:
    if destination.suffix.lower() == ".gguf":
        return write_gguf(checkpoint, source, destination, kind, progress=progress)
    reports: list[GgufReport] = []

    def make(folder: Path) -> None:
        name = f"{destination.name}-{kind}.gguf"
        reports.append(write_gguf(checkpoint, source, folder / name, kind, progress=progress))

    make_whole(destination, make, "give another folder")
    # The folder had another name while it was written.
    return replace(reports[0], modelfile=destination / reports[0].modelfile.name)
