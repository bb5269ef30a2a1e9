"""Fingerprints of models, which caches on disk are compared by."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..weights.load import parameters
from .lm import LM

FORMAT = 1
"""Raise it when the content of caches changes, so that older ones are not used."""

_SMALL = (".json", ".model", ".jinja")
_LARGE = (".safetensors", ".bin", ".gguf")


def fingerprint(lm: LM) -> str:
    """A hash of weights, adapter, config, tokenizer, template and dtype: all that decides a reply.

    Weights are hashed by size and by samples from all over each file, not by every byte.
    """
    digest = hashlib.sha256(str(FORMAT).encode())
    template = lm.tokenizer.template
    digest.update((template.source if template else "").encode())
    digest.update((lm.model.adapter or "").encode())
    dtypes = {str(array.dtype) for array in parameters(lm.model).values()}
    digest.update(f"{type(lm.model).__name__} {sorted(dtypes)} {lm.config}".encode())
    with suppress(OSError):  # the folder may have been deleted: the conversation can still be saved
        for file in sorted(lm.folder.iterdir()) if lm.folder else ():
            if file.suffix in _SMALL + _LARGE and file.is_file():
                digest.update(file.name.encode())
                _sample(file, digest, whole=file.suffix in _SMALL)
    return digest.hexdigest()[:32]


def _sample(file: Path, digest: Any, whole: bool) -> None:
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    block, most = 1 << 14, 128
    with file.open("rb") as data:
        if whole or size <= block * most:
            digest.update(data.read())
            return
        for number in range(most):
            data.seek((size - block) * number // (most - 1))
            digest.update(data.read(block))
