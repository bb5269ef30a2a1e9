"""Golden cases, files kept beside the repository, tokenizers made here, and comparing arrays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

if TYPE_CHECKING:
    import mlx.core as mx

GOLDEN = Path(__file__).parents[1] / "golden"
SHARED = Path(__file__).parents[3] / "shared"

CASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.safetensors"))
"""Tiny models with logits of the reference implementation; each folder's meta.json says how."""


def need_shared(*parts: str) -> Path:
    """A path of the data kept beside the repository; skips the test where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not beside the repository in ../shared")
    return path


def same(a: mx.array, b: mx.array, tolerance: float = 1e-5) -> None:
    """Assert that two arrays agree in shape, type and, but for rounding, values."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    np.testing.assert_allclose(np.array(a), np.array(b), rtol=tolerance, atol=1e-5)


def write_tokenizer(
    folder: Path, size: int = 512, special: Sequence[str] = (), words: Sequence[str] = ()
) -> None:
    """A tokenizer.json of single bytes, padded to `size` tokens with words never met.

    `special` are more special tokens, and `words` ordinary ones.
    """
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    alphabet += [*special, *words]
    names = alphabet + [f"¤{i}" for i in range(size - len(alphabet))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", *special])
    tokenizer.add_tokens([*words])
    tokenizer.save(str(folder / "tokenizer.json"))
