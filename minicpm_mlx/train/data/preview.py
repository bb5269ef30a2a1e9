"""Training data at a glance: how long its samples are, and what of one is learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from ...text.tokenizer import Tokenizer
from .batches import sequences
from .dataset import Data
from .samples import Sample

BINS = 10
"""At most so many rows has a histogram."""

Bin = tuple[int, int, int]
"""The least and the greatest length in it, and how many there are."""

Span = tuple[str, bool]
"""Text, and whether its tokens count."""


def histogram(lengths: Iterable[int]) -> list[Bin]:
    """How many of each length, in bins as wide as a power of two, from the first that has any.

    >>> histogram([3, 4, 9, 40, 41])
    [(1, 8, 2), (9, 16, 1), (17, 24, 0), (25, 32, 0), (33, 40, 1), (41, 48, 1)]
    """
    found = Counter(lengths)
    if not found:
        return []
    width = 1
    while (max(found) - 1) // width - (min(found) - 1) // width >= BINS:
        width *= 2
    bins = Counter[int]()
    for length, count in found.items():
        bins[(length - 1) // width] += count
    return [
        (number * width + 1, (number + 1) * width, bins[number])
        for number in range(min(bins), max(bins) + 1)
    ]


def spans(sample: Sample, tokenizer: Tokenizer) -> list[Span]:
    """The text of a sample, special tokens and all, in parts that count and parts that do not.

    A character of several tokens belongs to the part in which it ends.
    """
    stream = tokenizer.stream(skip_special=False)
    found: list[Span] = []
    counts = False
    for token, counts in zip(sample.ids, sample.mask, strict=True):
        _append(found, stream.add(token), counts)
    _append(found, stream.finish(), counts)
    return found


def overview(data: Data, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a person wants to see before training, as plain values (for JSON).

    `histogram` is of training lengths in tokens; `sample` has the texts of the first training
    item, two for a preference, as [text, whether it counts] parts.
    """
    texts = sequences(data.train)
    first = sequences(data.train[:1])
    return {
        "format": data.format,
        "kind": data.kind,
        "max_seq_length": data.max_seq_length,
        "counts": {split: asdict(counts) for split, counts in data.counts.items()},
        "histogram": histogram(len(sample.ids) for sample in texts),
        "sample": [spans(sample, tokenizer) for sample in first],
        "notes": list(data.notes),
        "overlong": list(data.overlong),
        "bad": list(data.bad),
        "sha256": data.sha256,
    }


def _append(found: list[Span], text: str, counts: bool) -> None:
    if text and found and found[-1][1] == counts:
        found[-1] = (found[-1][0] + text, counts)
    elif text:
        found.append((text, counts))
