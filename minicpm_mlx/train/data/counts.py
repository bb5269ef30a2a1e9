"""What became of the rows of training data: kept, cut, left out, and how much of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .batches import sequences
from .encoding import Encoded
from .messages import Message
from .samples import Item

LISTED = 5
"""How many places are named in a list of them."""

Prompt = list[Message] | str
"""What comes before the reply: messages, or the beginning of a plain text."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A row, read."""

    place: str
    encoded: Encoded
    prompt: Prompt


@dataclass(frozen=True)
class DataPart:
    """A file, read."""

    entries: list[Entry]
    bad: int = 0

    @property
    def items(self) -> list[Item]:
        """All that its rows became."""
        return [item for entry in self.entries for item in entry.encoded.items]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a part of the data consists of."""

    rows: int
    """Rows of the file that could be read."""
    samples: int
    """What they became."""
    tokens: int
    targets: int
    """Tokens that count."""
    truncated: int
    """Samples that lost their end."""
    dropped: int
    """Samples left out, as too long."""
    split: int
    """Rows that were too long and are in pieces."""
    bad: int
    """Rows that could not be read and were skipped."""


def summed(part: DataPart) -> Counts:
    """The numbers of a part."""
    encoded = [entry.encoded for entry in part.entries]
    samples = sequences(part.items)
    return Counts(
        rows=len({entry.place for entry in part.entries}),
        samples=len(part.items),
        tokens=sum(len(sample.ids) for sample in samples),
        targets=sum(sample.targets for sample in samples),
        truncated=sum(one.truncated for one in encoded),
        dropped=sum(one.dropped for one in encoded),
        split=_in_pieces(part.entries),
        bad=part.bad,
    )


def notes_of(parts: Mapping[str, DataPart], limit: int) -> list[str]:
    """What a person should know of what was left out, cut or in pieces."""
    entries = [entry for part in parts.values() for entry in part.entries]
    says = {
        f"longer than {limit} tokens and lost their end; raise max_seq_length": sum(
            entry.encoded.truncated for entry in entries
        ),
        f"left out, as too long for {limit} tokens; raise max_seq_length": sum(
            entry.encoded.dropped for entry in entries
        ),
        f"longer than {limit} tokens and in pieces": _in_pieces(entries),
        "bad and skipped": sum(part.bad for part in parts.values()),
    }
    notes = [f"{count} {what}" for what, count in says.items() if count]
    several = sum(len(entry.encoded.items) > 1 and not entry.encoded.split for entry in entries)
    if several:
        notes.append(
            f"{several} conversations are several samples each, as the template writes earlier "
            "turns otherwise than the last"
        )
    return notes


def _in_pieces(entries: Iterable[Entry]) -> int:
    return len({entry.place for entry in entries if entry.encoded.split})


def overlong(parts: Mapping[str, DataPart]) -> tuple[str, ...]:
    """The first of the rows that were cut or left out, and how long they are."""
    found: list[str] = []
    for part in parts.values():
        for entry in part.entries:
            one = entry.encoded
            fates = {"truncated": one.truncated, "dropped": one.dropped}
            what = ", ".join(name for name, count in fates.items() if count)
            if what and len(found) < LISTED:
                found.append(f"{entry.place}: {one.length} tokens, {what}")
    return tuple(found)
