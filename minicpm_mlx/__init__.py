"""MiniCPM 1.0 on Apple silicon, with MLX.

    import minicpm_mlx as mm

    lm = mm.load("demo")
    for piece in lm.stream("Once upon a time", max_tokens=64):
        print(piece.text, end="")
    reply, history = lm.chat("What is the capital of France?")

Names are imported when first used, so that `import minicpm_mlx` costs next to nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .device import limit_command_buffers, preload_blas

if TYPE_CHECKING:
    from .engine import Sampling, Session
    from .errors import MiniCPMError
    from .lm.chat import Chat
    from .lm.lm import LM
    from .lm.outputs import Completion, Piece, Stats
    from .loading.load import load
    from .loading.transformers_api import AutoModelForCausalLM, AutoTokenizer
    from .model.config import Config
    from .model_cards import Card, cards
    from .text.tokenizer import Tokenizer, load_tokenizer
    from .train.data.dataset import load_data
    from .train.finetune import finetune
    from .weights import load_model

__version__ = "0.1.0"

__all__ = [
    "LM",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "Card",
    "Chat",
    "Completion",
    "Config",
    "MiniCPMError",
    "Piece",
    "Sampling",
    "Session",
    "Stats",
    "Tokenizer",
    "cards",
    "finetune",
    "load",
    "load_data",
    "load_model",
    "load_tokenizer",
]

_HOMES = {
    "engine": ("Sampling", "Session"),
    "errors": ("MiniCPMError",),
    "lm.chat": ("Chat",),
    "lm.lm": ("LM",),
    "lm.outputs": ("Completion", "Piece", "Stats"),
    "loading.load": ("load",),
    "loading.transformers_api": ("AutoModelForCausalLM", "AutoTokenizer"),
    "model.config": ("Config",),
    "model_cards": ("Card", "cards"),
    "text.tokenizer": ("Tokenizer", "load_tokenizer"),
    "train.data.dataset": ("load_data",),
    "train.finetune": ("finetune",),
    "weights": ("load_model",),
}


def _tuned_buffers() -> tuple[int, int] | None:
    """Limits of command buffers that the environment states, or `bench --tune` found faster."""
    from .device import mac_chip, mlx_version
    from .loading.tuning import kept_buffers

    return kept_buffers(mac_chip(), mlx_version())


# Here, since they must come before the first import of MLX, and every import of ours comes by here.
preload_blas()
if sys.platform == "darwin":
    limit_command_buffers(_tuned_buffers)


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
