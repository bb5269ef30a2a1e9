"""Golden cases on this device: the logits are right, in whichever way they are computed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ..engine import KVCache
from ..model.fused import FusedModel
from ..model.transformer import Model
from ..weights.load import load_model
from .cases import CASES, LENGTH, POSITIONS, PROMPT, GoldenCase
from .formats import FORMATS, limit
from .results import CheckResult, Errors, catching, relative_error

CHUNK = 20
"""Tokens of the prompt that are read at first."""

CHECKS = ("logits", "inference form = reference form", "cached = uncached")


class Loaded(NamedTuple):
    """A golden case in one format, in both forms."""

    case: GoldenCase
    reference: Model
    inference: FusedModel


def load(case: GoldenCase, format: str) -> Loaded:
    """Load a case as the program loads a checkpoint: from a folder, by `load_model`."""
    packed = format == "4 bits"
    dtype = None if packed else format
    with tempfile.TemporaryDirectory() as folder:
        case.write(Path(folder), packed=packed)
        forms: list[Any] = [load_model(folder, dtype, fuse) for fuse in (False, True)]
    return Loaded(case, *forms)


def check_logits() -> Iterator[CheckResult]:
    """Compare the logits of every case in every format with the stored ones, and with each other:
    of both forms, and of the text read at once or through the cache."""
    for format in FORMATS:
        right, forms, cached = (Errors(name, format, limit(format)) for name in CHECKS)
        for case in CASES:
            with catching(case.name, right, forms, cached):
                _compare(load(case, format), right, forms, cached)
        yield from (errors.result() for errors in (right, forms, cached))


def _compare(loaded: Loaded, right: Errors, forms: Errors, cached: Errors) -> None:
    case = loaded.case
    ids, rows = mx.array([case.ids]), mx.array(POSITIONS)
    reference, inference = (model(ids)[0] for model in loaded[1:])
    steps = cached_logits(loaded.inference, ids)
    right.add(case.name, relative_error(inference[rows], case.logits))
    right.add(f"{case.name}, reference form", relative_error(reference[rows], case.logits))
    # At those positions alone: elsewhere a router or FATReLU may be near a tie.
    forms.add(case.name, relative_error(inference[rows], reference[rows]))
    cached.add(case.name, relative_error(steps[rows], inference[rows]))


def cached_logits(model: FusedModel, ids: mx.array) -> mx.array:
    """Logits (T, V) of ids (1, T), read in two chunks and then token by token."""
    cache = [KVCache() for _ in model.layers]
    ends = [CHUNK, *range(PROMPT, LENGTH + 1)]
    parts = [
        model(ids[:, begin:end], cache, LENGTH)[0]
        for begin, end in zip([0, *ends], ends, strict=False)
    ]
    return mx.concatenate(parts)
