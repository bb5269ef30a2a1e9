"""Summarises training data: a histogram of lengths, and the parts of a sample that are learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from typing import Any

from ...text.tokenizer import Tokenizer
from .batches import sequences
from .dataset import Data
from .samples import Sample

BINS = 10
"""Most rows of a histogram."""

Bin = tuple[int, int, int]
"""The least and the greatest length, and the number of samples."""

Span = tuple[str, bool]
"""Text, and whether its tokens count."""


def histogram(lengths: Iterable[int]) -> list[Bin]:
    """Counts lengths in bins as wide as a power of two, starting with the first that is not empty.

    >>> histogram([3, 4, 9, 40, 41])
    [(1, 8, 2), (9, 16, 1), (17, 24, 0), (25, 32, 0), (33, 40, 1), (41, 48, 1)]
    """
    counts = Counter(lengths)
    if not counts:
        return []
    width = 1
    while (max(counts) - 1) // width - (min(counts) - 1) // width >= BINS:
        width *= 2
    bins = Counter[int]()
    for length, count in counts.items():
        bins[(length - 1) // width] += count
    return [
        (index * width + 1, (index + 1) * width, bins[index])
        for index in range(min(bins), max(bins) + 1)
    ]


def spans(sample: Sample, tokenizer: Tokenizer) -> list[Span]:
    """Splits the text of a sample, with special tokens, by whether its tokens count.

    A character of several tokens belongs to the span in which it ends.
    """
    stream = tokenizer.stream(skip_special=False)
    tokens = zip(sample.ids, sample.mask, strict=True)
    texts = [(stream.add(token), counts) for token, counts in tokens]
    if texts:
        texts.append((stream.finish(), texts[-1][1]))
    return [
        ("".join(text for text, _ in group), counts)
        for counts, group in groupby((span for span in texts if span[0]), key=lambda span: span[1])
    ]


def overview(data: Data, tokenizer: Tokenizer) -> dict[str, Any]:
    """Summarises `data` as plain values, for JSON.

    `histogram` is of training lengths in tokens; `sample` has the texts of the first training
    item, two for a preference, as [text, whether it counts] spans.
    """
    return {
        "format": data.format,
        "kind": data.kind,
        "max_seq_length": data.max_seq_length,
        "counts": {split: asdict(counts) for split, counts in data.counts.items()},
        "histogram": histogram(len(sample.ids) for sample in sequences(data.train)),
        "sample": [spans(sample, tokenizer) for sample in sequences(data.train[:1])],
        "notes": list(data.notes),
        "overlong": list(data.overlong),
        "bad": list(data.bad),
        "sha256": data.sha256,
    }
