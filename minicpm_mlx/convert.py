"""A checkpoint's folder to another format's: the reference's, a Llama's, mlx-lm's, or GGUF.

Tensors are computed as their shard is written, so memory stays at one shard. A destination appears
whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from .device import DTYPES
from .errors import InvalidArgumentError, TemplateError
from .local import make_whole
from .registry import Card
from .template import BUILTIN, Template
from .tokenizer import load_tokenizer
from .tokenizer_files import TokenizerFiles
from .weights.checkpoint import Checkpoint, copy_beside, read_checkpoint, write_checkpoint
from .weights.derived import cast, dense
from .weights.gguf import KINDS, Written, write_gguf
from .weights.llama import Scales, fold, fold_tied, unfold

FORMATS = ("mup", "llama", "mlx", "gguf")
"""MiniCPM's own names and constants; a LlamaForCausalLM with a head of its own, as OpenBMB folds
it; a LlamaForCausalLM as small as the source, for mlx-lm; and llama.cpp's file."""

SHARD = 2 << 30
"""Bytes of tensors a file holds at most, and so about what a conversion takes of memory."""

PAPERS = ("README*", "LICENSE*", "NOTICE*")
"""Files that go along if they are at most PAPER_SIZE bytes long."""

PAPER_SIZE = 1 << 20

CODE = "*_minicpm.py"
"""The reference implementation, which the auto_map of a mup config.json names. Never run here."""

Progress = Callable[[str], object]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    format: str = "mlx",
    dtype: str | None = None,
    dequantize: bool = False,
    scales: Scales | None = None,
    gguf_type: str | None = None,
    card: Card | None = None,
    shard: int = SHARD,
    progress: Progress = lambda _: None,
) -> Written | None:
    """Write the model in the folder `source` in another format to `destination`, a new folder.

    `format` is one of FORMATS. `dtype` ("float32", "bfloat16", "float16") is that of all floats,
    the scales of packed matrices among them; by default each keeps its own, and products are
    rounded to it once. `dequantize` writes packed matrices dense. `scales` are the constants of the
    MiniCPM that a llama folder was made from, needed where it is to be one again. `gguf_type`, for
    gguf alone, is one of `weights.gguf.KINDS` (default F16), and `destination` may be a .gguf file.
    `card` knows the model's template, end tokens and file. `shard` is the size of a file in bytes.
    Of a GGUF file, what became of its tensors is returned.

    Raises InvalidArgumentError for what the format cannot express and for a `destination` that
    exists, WeightsError for what `dtype` cannot hold, and what `read_checkpoint` raises.
    """
    source, destination = Path(source), Path(destination)
    _check(format, dtype, gguf_type)
    if destination.exists():
        raise InvalidArgumentError(f"{destination} exists; give a folder that does not")
    checkpoint = read_checkpoint(source, card.file if card and card.repo else None)
    result = converted(checkpoint, format, dtype=dtype, dequantize=dequantize, scales=scales)
    if format == "gguf":
        return _write_gguf(result, source, destination, gguf_type or "F16", progress)

    def make(folder: Path) -> None:
        write_checkpoint(result, folder, shard=shard, progress=progress)
        copy_beside(source, folder)
        _copy_papers(source, folder, with_code=format == "mup")
        if format != "mup":
            _state_template(source, folder, card, with_bos=format == "mlx")
            _state_ends(folder, card)
        if format == "mlx" and (folder / "tokenizer.json").exists():
            # Under the name of LlamaTokenizer, transformers 5 builds another: " a" loses its space.
            _update(
                folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"}
            )

    make_whole(destination, make, "give another folder")
    return None


def converted(
    checkpoint: Checkpoint,
    format: str,
    *,
    dtype: str | None = None,
    dequantize: bool = False,
    scales: Scales | None = None,
) -> Checkpoint:
    """The checkpoint in another format; see `convert`. Nothing is computed before it is loaded."""
    if dequantize:
        checkpoint = dense(checkpoint)
    is_llama = checkpoint.config.dim_model_base is None  # which a MiniCPM has, stated or not
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
        checkpoint = cast(checkpoint, getattr(mx, dtype))
    return replace(checkpoint, raw=checkpoint.raw | _stored_dtype(checkpoint))


def _check(format: str, dtype: str | None, gguf_type: str | None) -> None:
    if format == "gguf" and dtype is not None:
        raise InvalidArgumentError(
            "format gguf: --type says how its matrices are held, not --dtype"
        )
    if format != "gguf" and gguf_type is not None:
        raise InvalidArgumentError(f"--type is for format gguf, got format {format!r}")
    for name, value, choices in (
        ("format", format, FORMATS),
        ("dtype", dtype, DTYPES),
        ("type", gguf_type, KINDS),
    ):
        if value is not None and value not in choices:
            raise InvalidArgumentError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _stored_dtype(checkpoint: Checkpoint) -> dict[str, Any]:
    """What config.json says of the floats: the embedding's, or its scales'."""
    tensors, name = checkpoint.tensors, "model.embed_tokens"
    dtype = tensors.get(f"{name}.scales", tensors[f"{name}.weight"]).dtype
    if not mx.issubdtype(dtype, mx.floating):
        return {}
    return {"torch_dtype": str(dtype).removeprefix("mlx.core.")}


def _write_gguf(
    checkpoint: Checkpoint, source: Path, destination: Path, kind: str, progress: Progress
) -> Written:
    if destination.suffix.lower() == ".gguf":
        return write_gguf(checkpoint, source, destination, kind, progress=progress)
    found: list[Written] = []

    def make(folder: Path) -> None:
        name = f"{destination.name}-{kind}.gguf"
        found.append(write_gguf(checkpoint, source, folder / name, kind, progress=progress))

    make_whole(destination, make, "give another folder")
    # It was written under another name.
    return replace(found[0], modelfile=destination / found[0].modelfile.name)


def _copy_papers(source: Path, folder: Path, *, with_code: bool) -> None:
    patterns = (*PAPERS, CODE) if with_code else PAPERS
    for path in (path for pattern in patterns for path in source.glob(pattern)):
        if path.is_file() and path.stat().st_size <= PAPER_SIZE:
            shutil.copyfile(path, folder / path.name)


def _state_template(source: Path, folder: Path, card: Card | None, *, with_bos: bool) -> None:
    """Write down the template that this library would use, for readers that do not know it.

    `with_bos` lets it begin with the token that leads every text: mlx-lm adds none to a chat.
    """
    if not any((source / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return
    tokenizer = load_tokenizer(source)
    template = tokenizer.template
    if card and card.template:
        template = Template(BUILTIN[card.template], template.bos_token if template else "")
    if template is None:
        return
    text = template.source
    if with_bos and tokenizer.adds_bos and not _begins_with_bos(template):
        text = "{{ bos_token }}" + text
    if text == TokenizerFiles(source).chat_template:
        return
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # which would be read first
    _update(folder / "tokenizer_config.json", {"chat_template": text})


def _begins_with_bos(template: Template) -> bool:
    try:
        text = template.render([{"role": "user", "content": "x"}])
    except TemplateError:
        return True  # not ours to mend
    return bool(template.bos_token) and text.startswith(template.bos_token)


def _state_ends(folder: Path, card: Card | None) -> None:
    """Write the card's end tokens where other programs look for them."""
    if card is None or not card.eos:
        return
    ends = card.eos[0] if len(card.eos) == 1 else list(card.eos)
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            _update(folder / name, {"eos_token_id": ends})


def _update(path: Path, values: Mapping[str, Any]) -> None:
    raw: dict[str, Any] = {}
    if path.exists():
        raw = json.loads(path.read_text(encoding="utf-8"))
    raw.update(values)
    path.write_text(json.dumps(raw, indent=2, ensure_ascii=False), encoding="utf-8")
