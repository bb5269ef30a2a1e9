"""Loads training data from files, and reports everything that was left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ...arguments import check_limits, limited, shown
from ...errors import (
    DataError,
    InvalidArgumentError,
    MissingTemplateError,
    TemplateError,
    TokenizerError,
)
from ...files.atomic import sha256
from ...files.rows import Row, listed, read_rows
from ...text.tokenizer import Tokenizer
from .counts import (
    Counts,
    DataSplit,
    Entry,
    Prompt,
    count_split,
    list_overlong,
    note_shared,
    notes_of,
)
from .encoding import Encoded, Encoder, check_kind, check_options
from .examples import Document, Example, Preference, ReplyPrompt
from .layouts import Format, recognise
from .samples import Item
from .splits import hold_out, split_files
from .unread import Unread, check_all_read, unread_fields

__all__ = ["Counts", "Data", "DataOptions", "load_data"]

PROMPTS = 4
"""Validation prompts kept as text."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which tokens are learned, and how strictly files are read."""

    max_seq_length: int = 2048
    """Most tokens of a sample."""
    mask: str = "assistant"
    """The tokens of a conversation that count: every reply ("assistant"), the "last" one, or
    "all"."""
    train_on: str = "thoughts"
    """The parts of a reply that count: "thoughts" (thoughts, answers and calls), or "answers" and
    calls alone."""
    overlong: str | None = None
    """Samples that are too long: "truncate", "drop" or "split"; None splits plain text and
    truncates everything else."""
    skip_bad: int = limited(0, least=0, whole=True)
    """Bad samples to skip, over all files, before one is an error."""
    ignore_columns: tuple[str, ...] = ()
    """Fields that are not read, as "id" or, inside a column, "messages.name"; any other such field
    is an error."""
    valid_fraction: float = limited(0.1, least=0, below=1)
    """Share of the training samples to validate on if the data has no validation set."""
    seed: int = limited(0, whole=True)
    """Selects those samples."""

    def __post_init__(self) -> None:
        check_limits(self)
        check_options(self.max_seq_length, self.mask, self.overlong, self.train_on)


@dataclass(frozen=True, kw_only=True)
class Data:
    """A data set; all its items have one type."""

    train: list[Item]
    valid: list[Item]
    test: list[Item]
    format: str
    """The recognised layout, for messages to the user."""
    kind: str
    """"sft" (items are Samples), "preference" (Pairs) or "kto" (Labelled)."""
    counts: dict[str, Counts]
    """By split: "train", "valid", "test"; a missing split has none."""
    notes: tuple[str, ...]
    """Remarks for the user before training."""
    bad: tuple[str, ...]
    """The skipped rows: the place and error of each."""
    overlong: tuple[str, ...]
    """The first rows that were too long: place, length and outcome."""
    sha256: dict[str, str]
    """Hashes of the files, by name."""
    prompts: tuple[Prompt, ...]
    """The first prompts of the validation set, to sample replies to: messages, or the beginning of
    a plain text."""
    max_seq_length: int


def load_data(
    path: str | Path,
    tokenizer: Tokenizer,
    options: DataOptions | None = None,
    progress: Callable[[int], object] | None = None,
) -> Data:
    """Loads a file, or the train, valid and test files of a folder, as token ids.

    `progress` is called every 1000 rows with the number of rows read. Raises DataError with file,
    line and field for faults in the data, MissingPackageError for .parquet without pyarrow,
    InvalidArgumentError for options that contradict each other.
    """
    options = options or DataOptions()
    reader = _DataReader(tokenizer, options, progress)
    files = split_files(path)
    splits = {name: reader.read(file) for name, file in files.items()}
    for name, split in splits.items():
        if not split.items:
            raise _empty_split(files[name], split, options.max_seq_length)
    notes: list[str] = []
    if "valid" not in splits:
        splits |= _hold_out(splits["train"], tokenizer, options, notes)
    valid = splits["valid"].entries if "valid" in splits else []
    items = {name: split.items for name, split in splits.items()}
    counts = {name: count_split(split) for name, split in splits.items()}
    reader.check_ignored()
    names = [listed([name]) for name in sorted(reader.ignored)]
    ignored = [f"fields left unread: {', '.join(names)}"] if names else []
    return Data(
        train=items["train"],
        valid=items.get("valid", []),
        test=items.get("test", []),
        format=reader.format.name,
        kind=reader.format.kind,
        counts=counts,
        notes=(
            *notes,
            *note_shared(items),
            *notes_of(splits, counts.values(), options.max_seq_length),
            *ignored,
        ),
        bad=tuple(reader.bad),
        overlong=list_overlong(splits),
        sha256={file.name: sha256(file) for file in files.values()},
        prompts=tuple(entry.prompt for entry in valid if entry.encoded.items)[:PROMPTS],
        max_seq_length=options.max_seq_length,
    )


@dataclass(frozen=True)
class DataOutline:
    """What rows say without a tokenizer."""

    format: str
    """As of Data, like `kind`."""
    kind: str
    splits: frozenset[str]
    """Which of "train", "valid" and "test" there are."""


def check_data(path: str | Path, options: DataOptions | None = None) -> DataOutline:
    """Reads all rows of a file or folder as `load_data` does, without a tokenizer.

    Raises as `load_data`, but for what depends on tokens.
    """
    options = options or DataOptions()
    reader = _DataReader(None, options, None)
    files = split_files(path)
    for file in files.values():
        split = reader.read(file)
        if not split.entries:
            raise _empty_split(file, split, options.max_seq_length)
    reader.check_ignored()
    name, kind = reader.format.name, reader.format.kind
    data_kind = "text" if reader.format.is_text else kind
    check_kind(data_kind, options.mask, options.overlong, options.train_on)
    return DataOutline(name, kind, frozenset(files))


def _hold_out(
    train: DataSplit, tokenizer: Tokenizer, options: DataOptions, notes: list[str]
) -> dict[str, DataSplit]:
    """Returns the new train and valid splits, if any, and adds a note."""
    if not options.valid_fraction:
        notes.append("no validation set, as valid_fraction is 0")
        return {}
    splits = hold_out(train, options.valid_fraction, options.seed, tokenizer)
    if splits is None:
        notes.append("no validation set, as there are too few samples; give a valid file")
        return {}
    notes.append(
        f"no validation set; {len(splits[1].items)} of {len(train.items)} samples were held out as "
        f"one, with seed {options.seed}"
    )
    return dict(zip(("train", "valid"), splits, strict=True))


def _empty_split(file: Path, split: DataSplit, limit: int) -> DataError:
    if not split.entries:
        return DataError(f"{file}: expected samples, found only {split.bad} bad ones; correct them")
    shortest = min(entry.encoded.length for entry in split.entries)
    return DataError(
        f"{file}: expected samples of at most {limit} tokens, found none (the shortest has "
        f"{shortest}); raise max_seq_length"
    )


@dataclass
class _DataReader:
    """Reads files that must all have the layout of the first row."""

    tokenizer: Tokenizer | None
    """None: rows are read, and not encoded."""
    options: DataOptions
    progress: Callable[[int], object] | None
    bad: list[str] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    """Fields that rows have and that are not read, as the options say."""
    rows: int = 0

    def __post_init__(self) -> None:
        self.encoder = self.tokenizer and Encoder(
            self.tokenizer,
            max_seq_length=self.options.max_seq_length,
            mask=self.options.mask,
            overlong=self.options.overlong,
            train_on=self.options.train_on,
        )
        self._first: tuple[str, Format] | None = None

    @property
    def format(self) -> Format:
        assert self._first is not None
        return self._first[1]

    def read(self, path: Path) -> DataSplit:
        before = len(self.bad)
        entries = []
        for row in read_rows(path):
            self.rows += 1
            if self.progress and self.rows % 1000 == 0:
                self.progress(self.rows)
            try:
                if isinstance(row, DataError):
                    raise row
                entries.append(self._encode(row))
            except DataError as error:
                self._skip(path, error)
        return DataSplit(entries, len(self.bad) - before)

    def _encode(self, row: Row) -> Entry:
        try:
            layout = recognise(row.value)
            self._check_layout(row.place, layout)
            example = layout.read(row.value)
            self._check_all_read(unread_fields(row.value, layout, example))
            encoded = self.encoder.encode(example) if self.encoder else Encoded([])
        except MissingTemplateError as error:
            advice = 'give rows of plain text: {"text": …}'
            raise DataError(f"{row.place}: {error.or_else(advice)}") from None
        except (DataError, TemplateError, TokenizerError) as error:
            raise DataError(f"{row.place}: {error}") from None
        return Entry(row.place, encoded, _prompt(example))

    def _check_layout(self, place: str, layout: Format) -> None:
        if self._first is None:
            self._first = place, layout
        first_place, first = self._first
        if layout.name != first.name:
            raise DataError(
                f"expected {first.name} as in {first_place}, found {layout.name}; "
                "rewrite one as the other, or train on one alone"
            )

    def _check_all_read(self, unread: Unread) -> None:
        ignored = self.options.ignore_columns
        self.ignored |= unread.keys() & set(ignored)
        check_all_read(unread, ignored)

    def check_ignored(self) -> None:
        """InvalidArgumentError for a field to ignore that is read, or that no row has."""
        for name in self.options.ignore_columns:
            if name not in self.ignored:
                raise InvalidArgumentError(
                    f"must name fields of the rows that are not read; {shown(name)} is read, or no "
                    "row has it: leave it out",
                    field="ignore_columns",
                )

    def _skip(self, path: Path, error: DataError) -> None:
        limit = self.options.skip_bad
        self.bad.append(str(error))
        if not limit:
            raise error
        if len(self.bad) > limit:
            examples = " · ".join(self.bad[:3])
            raise DataError(
                f"{path}: expected at most {limit} bad samples, found more; the first are: "
                f"{examples}"
            )


def _prompt(example: Example) -> Prompt:
    if isinstance(example, Document):
        return example.text[:60]
    messages = example.prompt if isinstance(example, Preference) else example.messages[:-1]
    return ReplyPrompt(messages, example.options)
