"""Counts the rows and samples of a data set, and lists what was truncated, dropped or split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...files.rows import listed
from .batches import digest, length, sequences
from .encoding import Encoded
from .examples import ReplyPrompt
from .samples import Item

LISTED = 5
"""Rows listed as examples."""

Prompt = ReplyPrompt | str
"""Messages before a reply, or the beginning of a plain text."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An encoded row."""

    place: str
    """File and line."""
    encoded: Encoded
    prompt: Prompt


@dataclass(frozen=True)
class DataSplit:
    """The rows of a training, validation or test file."""

    entries: list[Entry]
    bad: int = 0
    """Rows that were skipped as unreadable."""

    @property
    def items(self) -> list[Item]:
        return [item for entry in self.entries for item in entry.encoded.items]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The size of a split."""

    rows: int
    """Rows that were read."""
    samples: int
    """Training samples made from them."""
    tokens: int
    targets: int
    """Tokens that count."""
    truncated: int
    """Samples that lost their end."""
    dropped: int
    """Samples left out because they are too long."""
    split: int
    """Rows that were split because they are too long."""
    bad: int
    """Rows that were skipped as unreadable."""


def count_split(split: DataSplit) -> Counts:
    items, entries = split.items, split.entries
    samples = sequences(items)
    return Counts(
        rows=len({entry.place for entry in entries}),
        samples=len(items),
        tokens=sum(len(sample.ids) for sample in samples),
        targets=sum(sample.targets for sample in samples),
        truncated=sum(entry.encoded.truncated for entry in entries),
        dropped=sum(entry.encoded.dropped for entry in entries),
        split=len({entry.place for entry in entries if entry.encoded.split}),
        bad=split.bad,
    )


def notes_of(splits: Mapping[str, DataSplit], counts: Iterable[Counts], limit: int) -> list[str]:
    """Describes for the user what was truncated, dropped, split or skipped."""
    labels = {
        "truncated": f"longer than {limit} tokens and truncated; raise max_seq_length",
        "dropped": f"dropped, as longer than {limit} tokens; raise max_seq_length",
        "split": f"longer than {limit} tokens and split",
        "bad": "bad and skipped",
    }
    totals = Counter[str]()
    for split_counts in counts:
        totals.update({name: getattr(split_counts, name) for name in labels})
    notes = [f"{totals[name]} {label}" for name, label in labels.items() if totals[name]]
    entries = [entry for split in splits.values() for entry in split.entries]
    encoded = [entry.encoded for entry in entries]
    if several := sum(len(example.items) > 1 and not example.split for example in encoded):
        notes.append(
            f"{several} conversations make several samples each, as the template writes earlier "
            "replies differently from the last"
        )
    notes += _notes_on_replies(encoded)
    return notes + _notes_on_special_tokens(entries)


def _notes_on_replies(encoded: Sequence[Encoded]) -> list[str]:
    """Counts the calls and thoughts in replies, and says whether they are learned."""
    notes = []
    if calls := sum(example.calls for example in encoded):
        notes.append(f"{calls} calls of tools in replies, which are learned")
    if thoughts := sum(example.thoughts for example in encoded):
        learned = all(example.learns_thoughts for example in encoded)
        notes.append(
            f"{thoughts} thoughts in replies, which are "
            + ("learned" if learned else "read and not learned (train_on answers)")
        )
    return notes


def _notes_on_special_tokens(entries: Sequence[Entry]) -> list[str]:
    """Describes what rows that contain names of special tokens learn."""
    notes = []
    for is_text, label in (
        (False, "names of special tokens in messages, which stay ordinary text"),
        (True, "special tokens in plain text, which are read as tokens"),
    ):
        named = [e for e in entries if e.encoded.names and isinstance(e.prompt, str) == is_text]
        if named:
            names = sorted(frozenset[str]().union(*(entry.encoded.names for entry in named)))
            rows = len({entry.place for entry in named})
            notes.append(f"{label}: {listed(names)} (rows: {rows})")
    return notes


def note_shared(items: Mapping[str, Sequence[Item]]) -> list[str]:
    """Notes samples of the validation and the test set that are trained on as well."""
    trained = {digest([item]) for item in items["train"]}
    notes = []
    for name in ("valid", "test"):
        others = items.get(name, ())
        if shared := sum(digest([item]) in trained for item in others):
            notes.append(
                f"{shared} of {len(others)} samples of the {name} set are in the training set too, "
                "so its loss says less about new texts; remove them from one"
            )
    return notes


def note_context(items: Iterable[Item], *limits: int | None) -> list[str]:
    """Notes samples that are longer than the model's context, the least of `limits` in tokens."""
    context = min(filter(None, limits))
    longer = sum(length(item) > context for item in items)
    if not longer:
        return []
    return [
        f"{longer} samples are longer than the model's context of {context} tokens, past which it "
        f"has not learned to read; max_seq_length {context} cuts them"
    ]


def list_overlong(splits: Mapping[str, DataSplit]) -> tuple[str, ...]:
    """Lists the first rows that were truncated or dropped, with their lengths."""
    lines: list[str] = []
    for split in splits.values():
        for entry in split.entries:
            encoded = entry.encoded
            outcomes = [name for name in ("truncated", "dropped") if getattr(encoded, name)]
            if outcomes:
                lines.append(f"{entry.place}: {encoded.length} tokens, {', '.join(outcomes)}")
    return tuple(lines[:LISTED])
