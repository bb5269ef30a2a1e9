"""Log probabilities of texts that begin alike, the beginning computed once.

The options of a question share its prompt, and questions of a subset their examples. So a batch of
questions is read in three passes, each over the keys and values of the one before: what all of them
begin with, then each question, then the options of all. What a row begins with is never copied but
for the layer that is being computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import mlx.core as mx

from ... import device
from ...errors import ContextLengthError, InvalidArgumentError
from ...memory import prefill_chunk
from ...model.kernels import cpu_softmax
from ..batching.prefix_cache import common_prefix_length
from ..session import LanguageModel
from .shared_cache import KVSegment, SharedKVCache, SharedLayerCache

__all__ = ["Alternatives", "TextScores", "score", "shared_prefix_length"]

WINDOW = 64
"""Questions that are looked at together, so that those of a length share a pass."""
ROWS = 128
"""Positions whose logits are computed at once."""
WORTH = 32
"""Tokens that are worth a pass of their own."""


class Alternatives(NamedTuple):
    """Texts that begin alike, as token ids."""

    texts: Sequence[Sequence[int]]
    start: int = 1
    """The first place of which a score is wanted; the first token of a text has none."""


class TextScores(NamedTuple):
    """Of the tokens of one text, from `start` on."""

    logprobs: list[float]
    """Natural logarithms of the probabilities, under the model's own distribution."""
    greedy: list[bool]
    """Whether each token is the likeliest in its place."""


def shared_prefix_length(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all of `texts` begin with."""
    return min((common_prefix_length(texts[0], text) for text in texts), default=0)


def score(
    model: LanguageModel,
    groups: Iterable[Alternatives],
    *,
    context: int | None = None,
    positions: int | None = None,
) -> Iterator[tuple[int, list[TextScores]]]:
    """The scores of each group's texts, with the group's place, as they are computed.

    Texts may have up to `context` tokens, by default as many as the model's context; `positions`
    are read in one pass, by default as many as memory has room for. ContextLengthError for a longer
    text, InvalidArgumentError for a token that the model does not have.
    """
    limit = model.config.context_length if context is None else context
    scorer = _Scorer(model, positions or prefill_chunk(model.config))
    numbered = enumerate(groups)
    while window := list(islice(numbered, WINDOW)):
        plans = []
        for place, group in window:
            _check(group, limit, model.config.vocab_size)
            plans.append(_Plan(place, group, scorer.threshold))
        yield from scorer.window(plans)


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


class _Part(NamedTuple):
    """Texts of a group that are read over one beginning."""

    plan: _Plan
    members: list[int]
    """Their places in the group."""
    head: int
    """Tokens of the beginning; each text has one more, or more."""
    alone: bool
    """Its rotation depends on its length: no pass is shared."""

    @property
    def ids(self) -> Sequence[int]:
        return self.plan.group.texts[self.members[0]][: self.head]

    @property
    def free(self) -> Sequence[int]:
        """What may be read for several questions at once: less what is scored."""
        return self.ids[: min(self.head, self.plan.start) - 1]

    @property
    def length(self) -> int:
        return max(len(self.plan.group.texts[member]) for member in self.members)


class _Plan:
    """How a group is read, and what was found of it."""

    def __init__(self, place: int, group: Alternatives, threshold: int) -> None:
        self.place, self.group = place, group
        self.start = max(group.start, 1)
        self.scores = [TextScores([], []) for _ in group.texts]
        longest = max(map(len, group.texts), default=0)
        readable = [i for i, text in enumerate(group.texts) if len(text) > 1]
        texts = [group.texts[i] for i in readable]
        head = min([shared_prefix_length(texts), *(len(text) - 1 for text in texts)])
        if head and not 0 < threshold < longest:
            self.parts = [_Part(self, readable, head, False)]
        else:
            self.parts = [
                _Part(self, [i], len(group.texts[i]) - 1, 0 < threshold < len(group.texts[i]))
                for i in readable
            ]

    def note(self, member: int, token: tuple[float, bool]) -> None:
        self.scores[member].logprobs.append(token[0])
        self.scores[member].greedy.append(token[1])


def _families(parts: list[_Part]) -> list[list[_Part]]:
    """Parts in a row that share a beginning worth a pass, together; so are all that share none."""
    runs: list[list[_Part]] = []
    for part in parts:
        if runs and not part.alone and common_prefix_length(runs[-1][-1].free, part.free) >= WORTH:
            runs[-1].append(part)
        else:
            runs.append([part])
    single = [run[0] for run in runs if len(run) == 1]
    families = [run for run in runs if len(run) > 1]
    families += [[part] for part in single if part.alone]
    if plain := [part for part in single if not part.alone]:
        families.append(plain)
    return families


class _Scorer:
    """Reads plans, up to so many positions a pass."""

    def __init__(self, model: LanguageModel, positions: int) -> None:
        self.model, self.positions = model, positions
        self.threshold = model.config.rotation_threshold or 0
        self.head_ids: list[int] = []
        self.head = SharedKVCache([], 1)

    def window(self, plans: list[_Plan]) -> Iterator[tuple[int, list[TextScores]]]:
        """The scores of all plans: in the end, as those of a length are read together."""
        left = {plan.place: len(plan.parts) for plan in plans}
        yield from ((plan.place, plan.scores) for plan in plans if not plan.parts)
        for family in _families([part for plan in plans for part in plan.parts]):
            for batch in self._batches(family):
                self._batch(batch)
                for part in batch:
                    left[part.plan.place] -= 1
                    if not left[part.plan.place]:
                        yield part.plan.place, part.plan.scores

    def _batches(self, family: list[_Part]) -> Iterator[list[_Part]]:
        """Parts for one pass: heads that grow, padded to the last."""
        known = shared_prefix_length([part.free for part in family])
        family.sort(key=lambda part: part.head)
        batch: list[_Part] = []
        for part in family:
            width = part.head - (known if known >= WORTH else 0)
            if batch and (part.alone or (len(batch) + 1) * width > self.positions):
                yield batch
                batch = []
            batch.append(part)
        yield batch

    def _batch(self, batch: list[_Part]) -> None:
        length = max(part.length for part in batch)
        past = self._known(batch).of([0] * len(batch))
        known = past.offsets[0]
        hidden, past = self._read(past, [list(part.ids[known:]) for part in batch], length)
        self._score_heads(batch, hidden, known)
        self._score_tails(batch, past, length)

    def _known(self, batch: list[_Part]) -> SharedKVCache:
        """What all of the batch begin with, less what is to be scored, read once."""
        frees = [part.free for part in batch]
        wanted = shared_prefix_length(frees)
        if len(batch) == 1 or wanted < WORTH:
            return SharedKVCache([], 1)
        ids = list(frees[0][:wanted])
        have = common_prefix_length(self.head_ids, ids)
        if have < wanted - WORTH or have < len(self.head_ids):
            fresh, have = SharedKVCache([], 1), 0
            _, self.head = self._read(fresh, [ids], len(ids))
            self.head_ids = ids
        return self.head

    def _read(
        self, past: SharedKVCache, rows: list[list[int]], length: int
    ) -> tuple[mx.array, SharedKVCache]:
        """Read `rows` after their pasts: hidden states (B, T, hidden), and the pasts with them.

        `length` is that of the longest whole text.
        """
        longest = max(map(len, rows))
        hidden = []
        step = longest if len(rows) > 1 else min(longest, self.positions)
        for begin in range(0, longest, step):
            part = [row[begin : begin + step] for row in rows]
            found, past = self._pass(past, part, length)
            hidden.append(found)
        return (hidden[0] if len(hidden) == 1 else mx.concatenate(hidden, axis=1)), past

    def _pass(
        self, past: SharedKVCache, rows: list[list[int]], length: int
    ) -> tuple[mx.array, SharedKVCache]:
        steps = max(map(len, rows))
        ids = mx.array([row + [0] * (steps - len(row)) for row in rows])
        offsets, mask = past.offsets, past.mask(steps)
        offset = offsets[0] if len(set(offsets)) == 1 else mx.array(offsets)
        cache = [
            SharedLayerCache(past, number, offset, mask)
            for number in range(self.model.config.num_hidden_layers)
        ]
        hidden = self.model.hidden(ids, cache, length)
        layers = [layer.new for layer in cache if layer.new is not None]
        mx.eval(hidden, layers)
        segment = KVSegment(layers, [len(row) for row in rows])
        every = list(range(len(rows)))
        return hidden, SharedKVCache([*past.segments, (segment, every)], len(rows))

    def _score_heads(self, batch: list[_Part], hidden: mx.array, known: int) -> None:
        """Score what the texts of each part share, and the first token of each after that."""
        asked: list[tuple[_Plan, list[int], int, int, int]] = []
        for row, part in enumerate(batch):
            texts = part.plan.group.texts
            for place in range(part.plan.start, part.head):
                asked.append((part.plan, part.members, texts[part.members[0]][place], row, place))
            if part.plan.start <= part.head:
                for member in part.members:
                    asked.append((part.plan, [member], texts[member][part.head], row, part.head))
        width = hidden.shape[1]
        rows = [row * width + place - 1 - known for _, _, _, row, place in asked]
        found = self._scored(hidden, rows, [token for _, _, token, _, _ in asked])
        for (plan, members, *_), token in zip(asked, found, strict=True):
            for member in members:
                plan.note(member, token)

    def _score_tails(self, batch: list[_Part], past: SharedKVCache, length: int) -> None:
        """Score what is left of each text, that of all parts together."""
        tails = []
        for row, part in enumerate(batch):
            for member in part.members:
                tail = list(part.plan.group.texts[member][part.head :])
                if len(tail) > 1 and part.plan.start < part.head + len(tail):
                    tails.append((row, part, member, tail))
        tails.sort(key=lambda each: len(each[3]))
        while tails:
            count = 1
            while count < len(tails) and (count + 1) * len(tails[count][3]) <= self.positions:
                count += 1
            taken, tails = tails[:count], tails[count:]
            rows = [tail[:-1] for *_, tail in taken]
            hidden, _ = self._read(past.of([row for row, *_ in taken]), rows, length)
            width = hidden.shape[1]
            asked = [
                (part.plan, member, token, number * width + place)
                for number, (_, part, member, tail) in enumerate(taken)
                for place, token in enumerate(tail[1:])
                if part.plan.start <= part.head + 1 + place
            ]
            found = self._scored(hidden, [row for *_, row in asked], [t for _, _, t, _ in asked])
            for (plan, member, _, _), token in zip(asked, found, strict=True):
                plan.note(member, token)

    def _scored(
        self, hidden: mx.array, rows: list[int], tokens: list[int]
    ) -> list[tuple[float, bool]]:
        """Log probability of each token, and whether it is the likeliest, from rows of hidden
        (B, T, hidden), counted over both."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        found: list[tuple[float, bool]] = []
        for begin in range(0, len(rows), ROWS):
            part = slice(begin, begin + ROWS)
            logits = self.model.logits(flat[mx.array(rows[part])]).astype(mx.float32)  # (N, V)
            wanted = mx.array(tokens[part])[:, None]
            own = mx.take_along_axis(logits, wanted, axis=-1)[:, 0]
            best = own == logits.max(axis=-1)
            mx.eval(own, best)
            if device.slow_exponentials():
                total = cpu_softmax.softmax(logits)[1]
            else:
                total = mx.logsumexp(logits, axis=-1)
            values: list[float] = (own - total).tolist()  # type: ignore[assignment]
            found.extend(zip(values, best.tolist(), strict=True))  # type: ignore[arg-type]
        return found
