"""Encodes examples as token ids and loss masks, with the model's own chat template.

Each sample ends with the token that ends a reply: the template's own, or the model's EOS if the
template has none, as in OpenBMB's fine-tuning of MiniCPM 1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ...arguments import Limit, one_of
from ...errors import DataError, InvalidArgumentError
from ...text.message_text import PromptText
from ...text.tokenizer import Tokenizer
from .examples import Conversation, Document, Example, Judged, Preference, TemplateOptions
from .messages import Message
from .replies import ReplyEncoder, encode_continuation
from .samples import Item, Labelled, Pair, Sample

MASKS = ("assistant", "last", "all")
TRAIN_ON = ("thoughts", "answers")
OVERLONG = ("truncate", "drop", "split")

BLOCK = 1 << 20
"""Characters encoded at once: the tokenizer needs about 100 bytes for each. No token spans the
boundary of two blocks."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The items of one example, and how many were shortened to fit."""

    items: list[Item]
    truncated: int = 0
    """Items that lost their end."""
    dropped: int = 0
    """Items left out because they are too long."""
    split: bool = False
    """Whether the example was split because it is too long."""
    length: int = 0
    """Tokens of the longest sequence before truncation."""
    calls: int = 0
    """Calls of tools in the replies that count."""
    thoughts: int = 0
    """Thoughts in them."""
    learns_thoughts: bool = True
    names: frozenset[str] = frozenset()
    """Names of special tokens in the example: ordinary text in messages, tokens in plain text."""


def check_options(
    max_seq_length: int, mask: str, overlong: str | None, train_on: str = "thoughts"
) -> None:
    """Raises InvalidArgumentError for options of an Encoder that no example can have."""
    Limit(least=2, whole=True).check("max_seq_length", max_seq_length)
    one_of("mask", mask, MASKS)
    one_of("train_on", train_on, TRAIN_ON)
    if mask == "all" and train_on == "answers":
        raise InvalidArgumentError(
            'answers contradicts mask "all", which learns every token; leave one out',
            field="train_on",
        )
    if overlong is not None:
        one_of("overlong", overlong, OVERLONG)
    if mask == "last" and overlong == "split":
        raise InvalidArgumentError(
            'split contradicts mask "last": only the last piece would count; leave one out',
            field="overlong",
        )


def check_kind(kind: str, mask: str, overlong: str | None, train_on: str = "thoughts") -> None:
    """Raises InvalidArgumentError if an option is not for data of this kind.

    `kind` is "text" for plain text, or as of `layouts.Format`.
    """
    if kind == "text" and train_on == "answers":
        raise InvalidArgumentError("answers is not for plain text; leave it out", field="train_on")
    if kind == "text" and mask == "last":
        raise InvalidArgumentError("last is not for plain text; leave it out", field="mask")
    if kind in ("text", "sft"):
        return
    for name, value, wrong in (("mask", mask, "all"), ("overlong", overlong, "split")):
        if value == wrong:
            raise InvalidArgumentError(
                f"{wrong} is not for preferences and judged replies; leave it out", field=name
            )


class Encoder:
    """Encodes examples of one kind as items of at most `max_seq_length` tokens.

    `mask` selects the tokens of a conversation that count: all replies ("assistant"), the "last"
    reply, or "all" tokens but the first. In plain text every token counts; in preferences and
    judged replies the last reply does. `overlong` handles examples that are too long: "truncate"
    keeps the beginning, "drop" leaves them out, "split" makes pieces that together keep every token
    that counts, at the boundaries of exchanges where those fit. None splits plain text and
    truncates everything else. An item without a token that counts is dropped. With `train_on`
    "answers" the thoughts in replies do not count.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_seq_length: int = 2048,
        mask: str = "assistant",
        overlong: str | None = None,
        train_on: str = "thoughts",
    ) -> None:
        check_options(max_seq_length, mask, overlong, train_on)
        self.tokenizer = tokenizer
        self.limit = max_seq_length
        self.mask = mask
        self.overlong = overlong
        self.train_on = train_on
        # One int object per id: a list of a million tokens then takes 8 MB instead of 36.
        self._ids = list(range(tokenizer.vocab_size))

    def encode(self, example: Example) -> Encoded:
        """Raises TemplateError if the template cannot render `example`, InvalidArgumentError if
        mask or overlong does not apply to its kind."""
        kind = {Document: "text", Conversation: "sft"}.get(type(example), "preference")
        check_kind(kind, self.mask, self.overlong, self.train_on)
        self._typed: set[str] = set()
        options = TemplateOptions() if isinstance(example, Document) else example.options
        learns_thoughts = self.train_on == "thoughts"
        self._reply = ReplyEncoder(self.tokenizer, options, learns_thoughts=learns_thoughts)
        replies = self._counted(example)
        return replace(
            self._encode(example),
            calls=sum(len(reply.get("tool_calls", ())) for reply in replies),
            thoughts=sum("reasoning_content" in reply for reply in replies),
            learns_thoughts=learns_thoughts,
            names=frozenset(self._typed),
        )

    def _counted(self, example: Example) -> list[Message]:
        """The replies that count."""
        match example:
            case Conversation(messages, unlearned):
                return [messages[i] for i in self._replies(messages) if i not in unlearned]
            case Judged(messages):
                return messages[-1:]
            case Preference():
                return [example.chosen, example.rejected]
        return []

    def _encode(self, example: Example) -> Encoded:
        match example:
            case Document(text):
                return self._encode_document(text)
            case Conversation(messages, unlearned):
                return self._encode_conversation(messages, unlearned)
            case Judged(messages, good):
                sample = self._reply_sample(messages, is_good=good)
                return self._fit_item([sample], lambda cut: Labelled(cut[0], good))
            case Preference(prompt, chosen, rejected):
                samples = [
                    self._reply_sample([*prompt, reply], is_good=reply is chosen)
                    for reply in (chosen, rejected)
                ]
                if samples[0].ids == samples[1].ids:
                    raise DataError(
                        "rejected: expected another reply than chosen, found one that the template "
                        "makes the same; remove such samples"
                    )
                return self._fit_item(samples, lambda cut: Pair(cut[0], cut[1]))

    # Plain text

    def _encode_document(self, text: str) -> Encoded:
        self._typed |= self.tokenizer.typed(text).names
        first, *others = _blocks(text)
        ids = self.tokenizer.encode(first)
        for block in others:
            ids += encode_continuation(self.tokenizer, PromptText(block), "\n")
        if ids[-1] not in self.tokenizer.eos_ids:
            ids += self._eos()
        return self._fit([self._sample(ids, _all_but_first(ids))], self.overlong or "split")

    # Conversations

    def _encode_conversation(self, messages: list[Message], unlearned: frozenset[int]) -> Encoded:
        if unlearned and self.mask == "all":
            raise DataError(
                'expected every token to be learned, as mask is "all", found replies that are '
                'marked not to be; remove the marks, or take mask "assistant"'
            )
        if unlearned.issuperset(self._replies(messages)):
            raise DataError(
                "expected a reply to learn, found it marked not to be; remove the sample"
            )
        samples = self._samples(messages, unlearned)
        overlong = self.overlong or "truncate"
        if all(len(sample.ids) <= self.limit for sample in samples):
            return self._fit(samples, overlong)
        length = max(_longest(samples), self._length(messages))
        if overlong != "split":
            return replace(self._fit(samples, overlong), length=length)
        pieces = [
            sample
            for window in self._windows(messages, unlearned)
            for sample in self._samples(*window)
            if sample.targets
        ]
        return Encoded(self._fit(pieces, "split").items, split=True, length=length)

    def _length(self, messages: list[Message]) -> int:
        """Tokens of a conversation up to the end of its last reply."""
        return len(self._reply_sample(messages).ids)

    def _samples(self, messages: list[Message], unlearned: frozenset[int]) -> list[Sample]:
        """Encodes a conversation as one sample, or several if the template rewrites past replies.

        Samples without a token that counts are left out, if others have one.

        A reply is learned after the prompt of inference, token for token. Replies share a sample as
        long as each prompt continues the reply before it.
        """
        samples: list[Sample] = []
        ids: list[int] = []
        mask: list[bool] = []
        counts = True
        for index in self._replies(messages):
            is_learned = index not in unlearned
            prompt, reply, learned = self._encode_reply(messages[: index + 1], is_learned)
            if ids and prompt[: len(ids)] != ids:
                samples.append(self._ended(ids, mask, counts))
                ids, mask = [], []
            counts = is_learned
            mask += [False] * (len(prompt) - len(ids)) + [counts and each for each in learned]
            ids = prompt + reply
            if len(ids) > self.limit:
                break  # later replies have an even longer prompt
        samples.append(self._ended(ids, mask, counts))
        if self.mask == "all":
            return [Sample(sample.ids, _all_but_first(sample.ids)) for sample in samples]
        return [sample for sample in samples if sample.targets] or samples[-1:]

    def _replies(self, messages: list[Message]) -> list[int]:
        """Indices of the replies that `mask` selects; of "all", the last."""
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return replies if self.mask == "assistant" else replies[-1:]

    def _reply_sample(self, messages: list[Message], is_good: bool = True) -> Sample:
        """A sample in which the last reply counts."""
        prompt, reply, learned = self._encode_reply(messages, is_good)
        return self._ended(prompt + reply, [False] * len(prompt) + learned)

    def _encode_reply(
        self, messages: list[Message], is_good: bool = True
    ) -> tuple[list[int], list[int], list[bool]]:
        """Returns the ids of the last message's prompt, as at inference, and of the message, of
        which each token is learned or not."""
        encoded = self._reply.encode(messages, is_good=is_good)
        self._typed |= encoded.names
        return encoded.prompt, encoded.reply, encoded.learned

    def _ended(self, ids: list[int], mask: list[bool], counts: bool = True) -> Sample:
        """A sample that ends with an end mark, which counts if the reply before it does."""
        end = [] if ids[-1] in self.tokenizer.eos_ids else self._eos()
        return self._sample(ids + end, mask + [counts] * len(end))

    def _windows(
        self, messages: list[Message], unlearned: frozenset[int]
    ) -> Iterator[tuple[list[Message], frozenset[int]]]:
        """Splits a conversation into windows that fit, or that are one exchange; each starts with
        the system message, and has the indices of its replies that are not learned."""
        system = messages[:1] if messages[0]["role"] == "system" else []
        starts = [i for i, message in enumerate(messages) if message["role"] == "user"]
        ends = [*starts[1:], len(messages)]
        while starts:
            begin, fitting = starts[0], 1
            while fitting < len(starts):
                if self._length([*system, *messages[begin : ends[fitting]]]) > self.limit:
                    break
                fitting += 1
            end = ends[fitting - 1]
            marks = (i - begin + len(system) for i in unlearned if begin <= i < end)
            yield [*system, *messages[begin:end]], frozenset(marks)
            starts, ends = starts[fitting:], ends[fitting:]

    # Length

    def _fit_item(self, samples: list[Sample], item: Callable[[list[Sample]], Item]) -> Encoded:
        """Makes one item; truncated samples must keep part of the reply, and still differ."""
        cut = [self._cut(sample) for sample in samples]
        length = _longest(samples)
        if cut == samples:
            return Encoded([item(cut)], length=length)
        is_same = len(cut) == 2 and cut[0] == cut[1]
        if self.overlong == "drop" or is_same or not all(sample.targets for sample in cut):
            return Encoded([], dropped=1, length=length)
        return Encoded([item(cut)], truncated=1, length=length)

    def _fit(self, samples: list[Sample], overlong: str) -> Encoded:
        items: list[Item] = []
        truncated = dropped = 0
        split = False
        for sample in samples:
            if len(sample.ids) <= self.limit:
                items.append(sample)
            elif overlong == "split":
                split = True
                items += [piece for piece in self._pieces(sample) if piece.targets]
            elif overlong == "truncate" and (cut := self._cut(sample)).targets:
                truncated += 1
                items.append(cut)
            else:
                dropped += 1
        return Encoded(items, truncated, dropped, split, _longest(samples))

    def _cut(self, sample: Sample) -> Sample:
        return Sample(sample.ids[: self.limit], sample.mask[: self.limit])

    def _pieces(self, sample: Sample) -> Iterator[Sample]:
        """Splits a sample. Each piece begins with BOS, or else with the token before it, which does
        not count, so that every token is learned once."""
        bos = sample.ids[:1] if self.tokenizer.adds_bos else []
        yield self._cut(sample)
        for start in range(self.limit, len(sample.ids), self.limit - 1):
            piece = slice(start, start + self.limit - 1)
            first = bos or sample.ids[start - 1 : start]
            yield Sample([*first, *sample.ids[piece]], [False, *sample.mask[piece]])

    def _sample(self, ids: list[int], mask: list[bool]) -> Sample:
        return Sample([self._ids[i] for i in ids], mask)

    def _eos(self) -> list[int]:
        return list(self.tokenizer.eos_ids[:1])


def _blocks(text: str) -> Iterator[str]:
    """Splits a text into blocks, at a line break if there is one."""
    start = 0
    while start < len(text):
        end = start + BLOCK
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _all_but_first(ids: list[int]) -> list[bool]:
    return [False] + [True] * (len(ids) - 1)


def _longest(samples: list[Sample]) -> int:
    return max(len(sample.ids) for sample in samples)
