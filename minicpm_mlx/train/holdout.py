"""A validation set drawn from the training data where there is none."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..text.tokenizer import Tokenizer
from .data.counts import Entry, Part
from .data.encoding import Encoded
from .data.samples import Sample

FEWEST = 10
"""With fewer samples than this none are kept from training to validate on."""

MOST = 200
"""At most so many are: more would cost time at each validation and tell little."""


@dataclass(frozen=True)
class Held:
    """Training data in two parts."""

    train: Part
    valid: Part


def hold_out(train: Part, fraction: float, seed: int, tokenizer: Tokenizer) -> Held | None:
    """Some rows kept from training, the same for the same seed; of a few long texts, pieces.

    None where there are too few to share.
    """
    entries = train.entries
    if len(entries) < FEWEST and isinstance(entries[0].prompt, str):
        entries = [piece for entry in entries for piece in _pieces(entry, tokenizer)]
    usable = [i for i, entry in enumerate(entries) if entry.encoded.items]
    if len(usable) < FEWEST:
        return None
    count = max(1, min(MOST, len(usable) // 2, round(len(usable) * fraction)))
    chosen = set(random.Random(seed).sample(usable, count))
    kept = [entry for i, entry in enumerate(entries) if i not in chosen]
    return Held(Part(kept, train.bad), Part([entries[i] for i in sorted(chosen)]))


def _pieces(entry: Entry, tokenizer: Tokenizer) -> list[Entry]:
    """A text's pieces, each by itself."""
    found = []
    for item in entry.encoded.items:
        assert isinstance(item, Sample)
        alone = Encoded([item], split=entry.encoded.split, length=len(item.ids))
        found.append(Entry(entry.place, alone, tokenizer.decode(item.ids[:24])))
    return found
