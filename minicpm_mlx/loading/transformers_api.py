"""The names MiniCPM's own example imports from transformers, so that its other lines work as is.

from minicpm_mlx import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("openbmb/MiniCPM-2B-dpo-bf16")
model = AutoModelForCausalLM.from_pretrained("openbmb/MiniCPM-2B-dpo-bf16")
responds, history = model.chat(tokenizer, "山东省最高的山是哪座山？", temperature=0.5, top_p=0.8)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..device import as_dtype, on_cpu, select
from ..errors import InvalidArgumentError
from ..lm.lm import LM
from ..model_cards import resolve
from ..text.tokenizer import Tokenizer, tokenizer_of
from .load import load
from .store import folder_of

PLACES = {None: None, "auto": None, "cuda": None, "mps": None, "gpu": None, "cpu": "cpu"}
"""device_map to our device: any accelerator means the one MLX has."""


class AutoModelForCausalLM:
    """`from_pretrained` as in transformers."""

    @staticmethod
    def from_pretrained(
        name: str | Path,
        *,
        torch_dtype: Any = None,
        dtype: Any = None,
        device_map: str | None = None,
        trust_remote_code: bool | None = None,
    ) -> LM:
        """Load a model; see `minicpm_mlx.load`.

        `torch_dtype` (or `dtype`) may be torch's own object, MLX's, or a name; a 16-bit one means
        what an accelerator is good at, and gives way to float32 where there is none.
        `trust_remote_code` grants nothing: code in a model's folder is never run, and none is
        needed.
        """
        if not isinstance(device_map, str | None) or device_map not in PLACES:
            raise InvalidArgumentError(
                f"device_map must be one of auto, cuda, mps, gpu or cpu, got {device_map!r}"
            )
        wanted = dtype if dtype is not None else torch_dtype
        chosen = None if wanted is None or str(wanted) == "auto" else as_dtype(wanted)
        select(PLACES[device_map])
        if chosen is not None and chosen.size == 2 and on_cpu():
            chosen = None
        return load(name, dtype=chosen, device=PLACES[device_map])


class AutoTokenizer:
    """`from_pretrained` as in transformers."""

    @staticmethod
    def from_pretrained(name: str | Path, *, trust_remote_code: bool | None = None) -> Tokenizer:
        """The tokenizer of a model, downloading the model if need be."""
        card = resolve(str(name))
        return tokenizer_of(card, folder_of(card))
