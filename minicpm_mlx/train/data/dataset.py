"""Files of text to what a model is trained on, with an account of all that was left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ...arguments import number, shown, whole
from ...errors import (
    DataError,
    InvalidArgumentError,
    TemplateError,
    TokenizerError,
)
from ...files.atomic import sha256
from ...files.rows import Row, listed, read_rows
from ...text.tokenizer import Tokenizer
from .counts import (
    Counts,
    DataPart,
    Entry,
    Prompt,
    notes_of,
    overlong,
    summed,
)
from .encoding import Encoder
from .layouts import (
    Document,
    Example,
    Format,
    Preference,
    recognise,
)
from .samples import Item
from .splits import hold_out, split_files

__all__ = ["Counts", "Data", "DataOptions", "load_data"]

PROMPTS = 4
"""How many prompts of the validation set are kept as text."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What of the data is learned, and how strictly it is read."""

    max_seq_length: int = 2048
    """Tokens a sample may have."""
    mask: str = "assistant"
    """What counts in a conversation: every reply ("assistant"), the "last" one, or "all"."""
    overlong: str | None = None
    """Of samples that are too long: "truncate", "drop" or "split"; None: plain text is split, all
    else truncated."""
    skip_bad: int = 0
    """How many bad samples, over all files, are left out before one is an error."""
    valid_fraction: float = 0.1
    """What part of the training samples is validated on where the data has no validation set."""
    seed: int = 0
    """Which samples those are."""

    def __post_init__(self) -> None:
        if whole("skip_bad", self.skip_bad) < 0:
            raise InvalidArgumentError(f"skip_bad must be 0 or more, got {shown(self.skip_bad)}")
        if not 0 <= number("valid_fraction", self.valid_fraction) < 1:
            raise InvalidArgumentError(
                f"valid_fraction must be from 0 to below 1, got {shown(self.valid_fraction)}"
            )
        whole("seed", self.seed)


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a model is trained on; all items are of one type."""

    train: list[Item]
    valid: list[Item]
    test: list[Item]
    format: str
    """The layout that was recognised, for people."""
    kind: str
    """"sft" (items are Samples), "preference" (Pairs) or "kto" (Labelled)."""
    counts: dict[str, Counts]
    """By part: "train", "valid", "test"; a part that is not there has none."""
    notes: tuple[str, ...]
    """What a person should know before training."""
    bad: tuple[str, ...]
    """The rows that were skipped, each with its place and what is wrong with it."""
    overlong: tuple[str, ...]
    """The first of those that were too long: place, length, and what became of them."""
    sha256: dict[str, str]
    """By file name, of the files' bytes."""
    prompts: tuple[Prompt, ...]
    """The first prompts of the validation set, to see what the model makes of them: messages, or
    for plain text its beginning."""
    max_seq_length: int


def load_data(
    path: str | Path,
    tokenizer: Tokenizer,
    options: DataOptions | None = None,
    progress: Callable[[int], object] | None = None,
) -> Data:
    """A file, or the train, valid and test files of a folder, as token ids.

    `progress` is told now and then how many rows are read. Raises DataError with file, line and
    field for what is wrong in the data, MissingPackageError for .parquet without pyarrow,
    InvalidArgumentError for options that do not go together.
    """
    options = options or DataOptions()
    reader = _LayoutReader(tokenizer, options, progress)
    files = split_files(path)
    parts = {split: reader.part(file) for split, file in files.items()}
    for split, part in parts.items():
        if not part.items:
            raise _nothing_left(files[split], part, options.max_seq_length)
    notes: list[str] = []
    if "valid" not in parts:
        parts |= _validation(parts["train"], tokenizer, options, notes)
    valid = parts["valid"].entries if "valid" in parts else []
    items = {split: part.items for split, part in parts.items()}
    return Data(
        train=items["train"],
        valid=items.get("valid", []),
        test=items.get("test", []),
        format=reader.format.name,
        kind=reader.format.kind,
        counts={split: summed(part) for split, part in parts.items()},
        notes=(*notes, *notes_of(parts, options.max_seq_length), *reader.notes()),
        bad=tuple(reader.bad),
        overlong=overlong(parts),
        sha256={file.name: sha256(file) for file in files.values()},
        prompts=tuple(entry.prompt for entry in valid if entry.encoded.items)[:PROMPTS],
        max_seq_length=options.max_seq_length,
    )


def _validation(
    train: DataPart, tokenizer: Tokenizer, options: DataOptions, notes: list[str]
) -> dict[str, DataPart]:
    """Both parts, where one can be drawn from the other; `notes` says what was done."""
    if not options.valid_fraction:
        notes.append("no validation set, as valid_fraction is 0")
        return {}
    held = hold_out(train, options.valid_fraction, options.seed, tokenizer)
    if held is None:
        notes.append("no validation set, as the samples are too few to share; give a valid file")
        return {}
    notes.append(
        f"no validation set, so {len(held.valid.items)} of {len(train.items)} samples were drawn "
        f"as one, with seed {options.seed}"
    )
    return {"train": held.train, "valid": held.valid}


def _nothing_left(file: Path, part: DataPart, limit: int) -> DataError:
    if not part.entries:
        return DataError(f"{file}: expected samples, found {part.bad} bad ones alone; correct them")
    shortest = min(entry.encoded.length for entry in part.entries)
    return DataError(
        f"{file}: expected samples of at most {limit} tokens, found none (the shortest has "
        f"{shortest}); raise max_seq_length"
    )


@dataclass
class _LayoutReader:
    """Reads files that must all have one layout."""

    tokenizer: Tokenizer
    options: DataOptions
    progress: Callable[[int], object] | None
    bad: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    """Names of fields that mean nothing here."""
    rows: int = 0

    def __post_init__(self) -> None:
        self.encoder = Encoder(
            self.tokenizer,
            max_seq_length=self.options.max_seq_length,
            mask=self.options.mask,
            overlong=self.options.overlong,
        )
        self._first: tuple[str, Format] | None = None

    @property
    def format(self) -> Format:
        """That of the first row."""
        assert self._first is not None
        return self._first[1]

    def notes(self) -> list[str]:
        """What a person should know of the rows as they stand in the files."""
        return [f"fields that are not read: {listed(sorted(self.unread))}"] if self.unread else []

    def part(self, path: Path) -> DataPart:
        """All rows of a file."""
        before = len(self.bad)
        entries = []
        for row in read_rows(path):
            self.rows += 1
            if self.progress and self.rows % 1000 == 0:
                self.progress(self.rows)
            try:
                if isinstance(row, DataError):
                    raise row
                entries.append(self._entry(row))
            except DataError as error:
                self._skip(path, error)
        return DataPart(entries, len(self.bad) - before)

    def _entry(self, row: Row) -> Entry:
        try:
            form = recognise(row.value)
            self._alike(row.place, form)
            example = form.read(row.value)
            encoded = self.encoder.encode(example)
        except (DataError, TemplateError, TokenizerError) as error:
            raise DataError(f"{row.place}: {error}") from None
        self.unread |= row.value.keys() - form.fields
        return Entry(row.place, encoded, _prompt(example))

    def _alike(self, place: str, form: Format) -> None:
        if self._first is None:
            self._first = place, form
        first_place, first = self._first
        if form.name != first.name:
            raise DataError(
                f"expected {first.name} as in {first_place}, found {form.name}; "
                "rewrite one as the other, or train on one alone"
            )

    def _skip(self, path: Path, error: DataError) -> None:
        self.bad.append(str(error))
        most = self.options.skip_bad
        if not most:
            raise error
        if len(self.bad) > most:
            listed = " · ".join(self.bad[:3])
            raise DataError(
                f"{path}: expected at most {most} bad samples, found more; the first are: {listed}"
            )


def _prompt(example: Example) -> Prompt:
    if isinstance(example, Document):
        return example.text[:60]
    return example.prompt if isinstance(example, Preference) else example.messages[:-1]
