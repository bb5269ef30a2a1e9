"""Log probabilities of texts that begin alike, the beginning computed once.

The options of a question share its prompt, and questions of a subset their examples. So a batch of
questions is read in three passes, each over the keys and values of the one before: the beginning
that all questions share, then the rest of each question, then the options of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import mlx.core as mx

from ...errors import ContextLengthError, InvalidArgumentError
from ...memory import prefill_chunk
from ...model import kernels
from ..batching.prefix_cache import common_prefix_length
from ..session import LanguageModel
from .shared_cache import SharedKVCache, read_rows

WINDOW = 64
"""Groups looked at together, so that those of similar length share a pass."""
LOGIT_ROWS = 128
"""Positions whose logits are computed at once; those of a whole pass would fill the memory."""
MIN_SHARED = 32
"""Shared tokens that are worth a pass of their own."""


class Alternatives(NamedTuple):
    """Texts that begin alike, as token ids."""

    texts: Sequence[Sequence[int]]
    start: int = 1
    """First position to score; the first token of a text has no score."""


class TextScores(NamedTuple):
    """Scores of the tokens of one text, from `start` on."""

    logprobs: list[float]
    """Natural logarithms of the probabilities, under the model's own distribution."""
    greedy: list[bool]
    """Whether each token is the likeliest at its position."""


def shared_prefix_length(texts: Sequence[Sequence[int]]) -> int:
    return min((common_prefix_length(texts[0], text) for text in texts), default=0)


def score(
    model: LanguageModel,
    groups: Iterable[Alternatives],
    *,
    context: int | None = None,
    positions: int | None = None,
) -> Iterator[tuple[int, list[TextScores]]]:
    """Yield each group's index and the scores of its texts, in the order they are computed.

    Texts may have up to `context` tokens, by default the model's context; a pass reads up to
    `positions` tokens, by default as many as memory allows. ContextLengthError for a longer text,
    InvalidArgumentError for a token outside the vocabulary.
    """
    limit = model.config.context_length if context is None else context
    reader = _Reader(model, positions or prefill_chunk(model.config))
    numbered = enumerate(groups)
    while window := list(islice(numbered, WINDOW)):
        for _, group in window:
            _check(group, limit, model.config.vocab_size)
        threshold = model.config.rotation_threshold or 0
        yield from _score_window(reader, [_Group(*entry, threshold) for entry in window])


def _check(group: Alternatives, limit: int, vocabulary: int) -> None:
    longest = max(map(len, group.texts), default=0)
    if longest > limit:
        raise ContextLengthError(
            f"a text has {longest} tokens and the context is {limit}; shorten it"
        )
    if not all(0 <= token < vocabulary for text in group.texts for token in text):
        raise InvalidArgumentError(
            f"a text holds ids outside 0..{vocabulary - 1}; is the tokenizer another model's?"
        )


class _Group:
    """A group with its branches, and the scores found so far."""

    def __init__(self, index: int, group: Alternatives, threshold: int) -> None:
        self.index, self.texts = index, group.texts
        self.start = max(group.start, 1)
        self.scores = [TextScores([], []) for _ in group.texts]
        longest = max(map(len, group.texts), default=0)
        scorable = [member for member, text in enumerate(group.texts) if len(text) > 1]
        texts = [group.texts[member] for member in scorable]
        head = min([shared_prefix_length(texts), *(len(text) - 1 for text in texts)])
        # Beyond the threshold a text's rotation depends on its length, so it shares nothing.
        if head and not 0 < threshold < longest:
            self.branches = [_Branch(self, scorable, head, exclusive=False)]
        else:
            self.branches = [
                _Branch(self, [member], len(text) - 1, exclusive=0 < threshold < len(text))
                for member, text in zip(scorable, texts, strict=True)
            ]
        self.open_branches = len(self.branches)

    def record(self, members: Sequence[int], logprob: float, greedy: bool) -> None:
        """Append the next position's score to the texts that share it."""
        for member in members:
            self.scores[member].logprobs.append(logprob)
            self.scores[member].greedy.append(greedy)


class _Branch(NamedTuple):
    """Texts of a group that are read after one head."""

    group: _Group
    members: list[int]
    """Indices of the texts."""
    head_length: int
    """Each text has at least one more token."""
    exclusive: bool
    """Whether it must have its passes to itself."""

    @property
    def head(self) -> Sequence[int]:
        return self.group.texts[self.members[0]][: self.head_length]

    @property
    def shareable(self) -> Sequence[int]:
        """The beginning that several branches may share: it ends before what is scored."""
        return self.head[: min(self.head_length, self.group.start) - 1]

    @property
    def longest(self) -> int:
        return max(len(self.group.texts[member]) for member in self.members)


class _Target(NamedTuple):
    """A token to score."""

    group: _Group
    members: Sequence[int]
    token: int
    row: int
    """Of the hidden state that predicts it, in (B * T, hidden)."""


def _score_window(reader: _Reader, groups: list[_Group]) -> Iterator[tuple[int, list[TextScores]]]:
    yield from ((group.index, group.scores) for group in groups if not group.branches)
    for family in _families([branch for group in groups for branch in group.branches]):
        for batch in _batches(family, reader.positions):
            _score_batch(reader, batch)
            for branch in batch:
                branch.group.open_branches -= 1
                if not branch.group.open_branches:
                    yield branch.group.index, branch.group.scores


def _families(branches: list[_Branch]) -> list[list[_Branch]]:
    """Group successive branches whose shared beginning is worth a pass; and all others."""
    runs: list[list[_Branch]] = []
    for branch in branches:
        previous = runs[-1][-1].shareable if runs and not branch.exclusive else ()
        if common_prefix_length(previous, branch.shareable) >= MIN_SHARED:
            runs[-1].append(branch)
        else:
            runs.append([branch])
    single = [run[0] for run in runs if len(run) == 1]
    families = [run for run in runs if len(run) > 1]
    families += [[branch] for branch in single if branch.exclusive]
    if rest := [branch for branch in single if not branch.exclusive]:
        families.append(rest)
    return families


def _batches(family: list[_Branch], positions: int) -> Iterator[list[_Branch]]:
    """Split a family into passes, by length, since heads are padded to the longest of a pass."""
    shared = shared_prefix_length([branch.shareable for branch in family])
    family.sort(key=lambda branch: branch.head_length)
    batch: list[_Branch] = []
    for branch in family:
        width = branch.head_length - (shared if shared >= MIN_SHARED else 0)
        if batch and (branch.exclusive or (len(batch) + 1) * width > positions):
            yield batch
            batch = []
        batch.append(branch)
    yield batch


def _score_batch(reader: _Reader, batch: list[_Branch]) -> None:
    length = max(branch.longest for branch in batch)
    cache = reader.shared_beginning(batch).select([0] * len(batch))
    known = cache.offsets[0]
    heads = [branch.head[known:] for branch in batch]
    hidden, cache = reader.read(cache, heads, length)  # (B, T, hidden)
    reader.score(hidden, _head_targets(batch, hidden.shape[1], known))
    tails = [
        (row, branch, member)
        for row, branch in enumerate(batch)
        for member in branch.members
        if len(branch.group.texts[member]) > max(branch.head_length + 1, branch.group.start)
    ]
    tails.sort(key=lambda tail: _tail_length(*tail[1:]))
    while tails:
        count = 1
        while count < len(tails) and (
            (count + 1) * _tail_length(*tails[count][1:]) <= reader.positions
        ):
            count += 1
        part, tails = tails[:count], tails[count:]
        # The last token is only predicted, never read.
        ids = [branch.group.texts[member][branch.head_length : -1] for _, branch, member in part]
        hidden, _ = reader.read(cache.select([row for row, *_ in part]), ids, length)
        reader.score(hidden, _tail_targets([tail[1:] for tail in part], hidden.shape[1]))


def _tail_length(branch: _Branch, member: int) -> int:
    return len(branch.group.texts[member]) - branch.head_length


def _head_targets(batch: list[_Branch], width: int, known: int) -> Iterator[_Target]:
    """The scored tokens of each head, whose hidden states begin at `known`; then the first token
    after it of each text."""
    for row, branch in enumerate(batch):
        group, head_length = branch.group, branch.head_length
        first = row * width - known - 1
        for position in range(group.start, head_length):
            yield _Target(group, branch.members, branch.head[position], first + position)
        if group.start <= head_length:
            for member in branch.members:
                token = group.texts[member][head_length]
                yield _Target(group, [member], token, first + head_length)


def _tail_targets(tails: list[tuple[_Branch, int]], width: int) -> Iterator[_Target]:
    """The scored tokens of each text after the first one that follows its head."""
    for row, (branch, member) in enumerate(tails):
        text, begin = branch.group.texts[member], branch.head_length + 1
        for position in range(max(begin, branch.group.start), len(text)):
            yield _Target(branch.group, [member], text[position], row * width + position - begin)


class _Reader:
    """Runs the passes, of up to `positions` tokens, and keeps the last shared beginning."""

    def __init__(self, model: LanguageModel, positions: int) -> None:
        self.model, self.positions = model, positions
        self.shared_ids: list[int] = []
        self.shared_cache = SharedKVCache([], 1)

    def shared_beginning(self, batch: list[_Branch]) -> SharedKVCache:
        """Return a cache (of one row) with the beginning that all of the batch share."""
        beginnings = [branch.shareable for branch in batch]
        length = shared_prefix_length(beginnings)
        if len(batch) == 1 or length < MIN_SHARED:
            return SharedKVCache([], 1)
        ids = list(beginnings[0][:length])
        common = common_prefix_length(self.shared_ids, ids)
        if common < length - MIN_SHARED or common < len(self.shared_ids):
            _, self.shared_cache = self.read(SharedKVCache([], 1), [ids], len(ids))
            self.shared_ids = ids
        return self.shared_cache

    def read(
        self, cache: SharedKVCache, rows: Sequence[Sequence[int]], length: int
    ) -> tuple[mx.array, SharedKVCache]:
        """As `read_rows`, a single row that is longer than `positions` in chunks."""
        longest = max(map(len, rows))
        step = longest if len(rows) > 1 else min(longest, self.positions)
        parts = []
        for begin in range(0, longest, step):
            chunk = [row[begin : begin + step] for row in rows]
            hidden, cache = read_rows(self.model, cache, chunk, length)
            parts.append(hidden)
        return mx.concatenate(parts, axis=1), cache

    def score(self, hidden: mx.array, targets: Iterable[_Target]) -> None:
        """Record the log probability of each target, from hidden states (B, T, hidden)."""
        states = hidden.reshape(-1, hidden.shape[-1])  # (B * T, hidden)
        remaining = iter(targets)
        while part := list(islice(remaining, LOGIT_ROWS)):
            rows = mx.array([target.row for target in part])
            tokens = mx.array([target.token for target in part])
            logits = self.model.logits(states[rows]).astype(mx.float32)  # (N, V)
            own = mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
            greedy: list[bool] = (own == logits.max(axis=-1)).tolist()  # type: ignore[assignment]
            logprobs: list[float] = (own - kernels.logsumexp(logits)).tolist()  # type: ignore[assignment]
            for target, logprob, best in zip(part, logprobs, greedy, strict=True):
                target.group.record(target.members, logprob, best)
