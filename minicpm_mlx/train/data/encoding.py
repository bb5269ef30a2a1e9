"""Examples to token ids and masks, with the model's own template.

A prompt has in training exactly the ids that `chat_ids` gives it at inference. What the template
writes after it is encoded as it comes in the whole text; where a token would reach from the prompt
into the reply (MiniCPM's `<AI>` and a reply that begins with `<`), the prompt's ids win and the
reply is encoded by itself. Each sample ends with the token that ends a reply: the template's own,
or the model's eos where the template has none, as in OpenBMB's fine-tuning of MiniCPM 1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ...arguments import shown, whole
from ...errors import InvalidArgumentError
from ...text.tokenizer import Tokenizer
from .layouts import (
    Conversation,
    Document,
    Example,
    Judged,
    Preference,
)
from .messages import Message
from .samples import (
    Item,
    Labelled,
    Pair,
    Sample,
)

__all__ = ["MASKS", "OVERLONG", "Encoded", "Encoder"]

MASKS = ("assistant", "last", "all")
OVERLONG = ("truncate", "drop", "split")

BLOCK = 1 << 20
"""Characters of a text that are encoded at once: the tokenizer takes a hundred times as many bytes.
Between two blocks no token reaches over."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of an example."""

    items: list[Item]
    truncated: int = 0
    """Items that lost their end."""
    dropped: int = 0
    """Items left out, as too long."""
    split: bool = False
    """Whether it was too long and is in pieces."""
    length: int = 0
    """Tokens of the longest sequence before any was cut."""


class Encoder:
    """Turns examples of one kind into items of at most `max_seq_length` tokens.

    `mask` says what counts in a conversation: every reply ("assistant"), the "last" one, or "all"
    tokens but the first. In plain text all count; in preferences and judged replies, the last
    reply. `overlong` says what becomes of an example that is too long: "truncate" keeps its
    beginning, "drop" leaves it out, "split" makes pieces that together have all that counts, each
    but a plain text's with whole turns where those fit; None: plain text is split, all else
    truncated. An item that would have no token that counts is dropped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_seq_length: int = 2048,
        mask: str = "assistant",
        overlong: str | None = None,
    ) -> None:
        if whole("max_seq_length", max_seq_length) < 2:
            raise InvalidArgumentError(
                f"max_seq_length must be 2 or more, got {shown(max_seq_length)}"
            )
        _one_of("mask", mask, MASKS)
        if overlong is not None:
            _one_of("overlong", overlong, OVERLONG)
        if mask == "last" and overlong == "split":
            raise InvalidArgumentError(
                'mask="last" and overlong="split" contradict each other: only the last piece would '
                "count; leave one"
            )
        self.tokenizer = tokenizer
        self.limit = max_seq_length
        self.mask = mask
        self.overlong = overlong
        # One object for each id: a list of a million tokens then is 8 MB instead of 36.
        self._ids = list(range(tokenizer.vocab_size))

    def encode(self, example: Example) -> Encoded:
        """The items of `example`.

        Raises TemplateError where the template cannot render it, InvalidArgumentError where mask
        or overlong is not for its kind.
        """
        if isinstance(example, Document):
            self._refuse(mask="last", kind="plain text")
            return self._document(example.text)
        if isinstance(example, Conversation):
            return self._conversation(example.messages)
        self._refuse(mask="all", kind="preferences and judged replies")
        self._refuse(overlong="split", kind="preferences and judged replies")
        if isinstance(example, Judged):
            ids, reply = self._turn(example.messages)
            return self._fitted(
                [self._ending(ids, reply)], lambda found: Labelled(found[0], example.good)
            )
        return self._pair(example)

    # Plain text

    def _document(self, text: str) -> Encoded:
        first, *others = _blocks(text)
        ids = self.tokenizer.encode(first)
        for block in others:
            ids += self._alone(block, "\n")
        if ids[-1] not in self.tokenizer.eos_ids:
            ids += self._eos()
        sample = self._sample(ids, [False] + [True] * (len(ids) - 1))
        return self._fit([sample], self.overlong or "split")

    # Conversations

    def _conversation(self, messages: list[Message]) -> Encoded:
        samples = self._samples(messages)
        how = self.overlong or "truncate"
        if all(len(sample.ids) <= self.limit for sample in samples):
            return self._fit(samples, how)
        length = max(_longest(samples), self._length(messages))
        if how != "split":
            return replace(self._fit(samples, how), length=length)
        parts = [piece for turns in self._windows(messages) for piece in self._samples(turns)]
        return Encoded(self._fit(parts, "split").items, split=True, length=length)

    def _length(self, messages: list[Message]) -> int:
        """How many tokens a conversation has, up to the end of its last reply."""
        return len(self._ending(*self._turn(messages)).ids)

    def _samples(self, messages: list[Message]) -> list[Sample]:
        """A conversation: one sample, or several where the template writes earlier turns otherwise.

        A reply is learned after the prompt that inference would give it, token for token. As long
        as each prompt goes on from the reply before it, all are in one sample.
        """
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.mask != "assistant":
            replies = replies[-1:]
        found: list[Sample] = []
        ids: list[int] = []
        mask: list[bool] = []
        for at in replies:
            prompt, reply = self._turn(messages[: at + 1])
            if ids and prompt[: len(ids)] != ids:
                found.append(self._closed(ids, mask))
                ids, mask = [], []
            mask += [False] * (len(prompt) - len(ids)) + [True] * len(reply)
            ids = prompt + reply
            if len(ids) > self.limit:
                break  # what comes later has a still longer prompt
        found.append(self._closed(ids, mask))
        if self.mask == "all":
            return [Sample(one.ids, [False] + [True] * (len(one.ids) - 1)) for one in found]
        return found

    def _turn(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """The prompt of the last message, as inference has it, and that message's own tokens."""
        before = messages[:-1]
        text = self.tokenizer.chat_text(before)
        prompt = self.tokenizer.encode(text)
        everything = self.tokenizer.chat_text(messages, add_generation_prompt=False)
        # A template may write a past turn without what its generation prompt begins it with.
        rest = everything[len(text) :] if everything.startswith(text) else messages[-1]["content"]
        ids = self.tokenizer.encode(text + rest)
        goes_on = ids[: len(prompt)] == prompt
        reply = ids[len(prompt) :] if goes_on else self._alone(rest)
        return prompt, self._up_to_end(reply)

    def _alone(self, text: str, *before: str) -> list[int]:
        """The tokens of `text` where it goes on from another text, with which none of it merges;
        `before` is what is tried first as that other text."""
        for anchor in (*before, *_ANCHORS):
            ids = self.tokenizer.encode(anchor, add_bos=False)
            both = self.tokenizer.encode(anchor + text, add_bos=False)
            if both[: len(ids)] == ids:
                return both[len(ids) :]
        return self.tokenizer.encode(text, add_bos=False)  # at worst with a space before it

    def _up_to_end(self, reply: list[int]) -> list[int]:
        """`reply` without the line break or so that a template writes after its end mark."""
        ends = [i for i, token in enumerate(reply) if token in self.tokenizer.eos_ids]
        if ends and not self.tokenizer.decode(reply[ends[-1] + 1 :], skip_special=False).strip():
            return reply[: ends[-1] + 1]
        return reply

    def _closed(self, ids: list[int], mask: list[bool]) -> Sample:
        """A sample that ends with an end mark, which counts."""
        end = [] if ids[-1] in self.tokenizer.eos_ids else self._eos()
        return self._sample(ids + end, mask + [True] * len(end))

    def _ending(self, prompt: list[int], reply: list[int]) -> Sample:
        return self._closed(prompt + reply, [False] * len(prompt) + [True] * len(reply))

    def _windows(self, messages: list[Message]) -> Iterator[list[Message]]:
        """Parts of a conversation that fit, or are one exchange, each after the system text."""
        system = messages[:1] if messages[0]["role"] == "system" else []
        begin = len(system)
        while begin < len(messages):
            end = begin + 2
            while end < len(messages):
                if self._length([*system, *messages[begin : end + 2]]) > self.limit:
                    break
                end += 2
            yield [*system, *messages[begin:end]]
            begin = end

    # Two replies

    def _pair(self, example: Preference) -> Encoded:
        both = []
        for text in (example.chosen, example.rejected):
            reply = {"role": "assistant", "content": text}
            both.append(self._ending(*self._turn([*example.prompt, reply])))
        return self._fitted(both, lambda found: Pair(found[0], found[1]))

    # Length

    def _fitted(self, samples: list[Sample], item: Callable[[list[Sample]], Item]) -> Encoded:
        """One item of samples that each keep the prompt whole; they must still differ."""
        cut = [self._cut(sample) for sample in samples]
        if cut == samples:
            return Encoded([item(cut)], length=_longest(samples))
        same = len(cut) == 2 and cut[0] == cut[1]
        if self.overlong == "drop" or same or not all(sample.targets for sample in cut):
            return Encoded([], dropped=1, length=_longest(samples))
        return Encoded([item(cut)], truncated=1, length=_longest(samples))

    def _fit(self, samples: list[Sample], how: str) -> Encoded:
        items: list[Item] = []
        truncated = dropped = 0
        split = False
        for sample in samples:
            if len(sample.ids) <= self.limit:
                items.append(sample)
            elif how == "split":
                split = True
                items += [piece for piece in self._pieces(sample) if piece.targets]
            elif how == "truncate" and (cut := self._cut(sample)).targets:
                truncated += 1
                items.append(cut)
            else:
                dropped += 1
        return Encoded(items, truncated, dropped, split, _longest(samples))

    def _cut(self, sample: Sample) -> Sample:
        return Sample(sample.ids[: self.limit], sample.mask[: self.limit])

    def _pieces(self, sample: Sample) -> Iterator[Sample]:
        """A sample in parts; each begins with bos or, where there is none, with the token before
        it, which does not count, so that no token goes unlearned."""
        bos = sample.ids[:1] if self.tokenizer.adds_bos else []
        yield self._cut(sample)
        for at in range(self.limit, len(sample.ids), self.limit - 1):
            part = slice(at, at + self.limit - 1)
            yield Sample(
                [*(bos or sample.ids[at - 1 : at]), *sample.ids[part]], [False, *sample.mask[part]]
            )

    def _sample(self, ids: list[int], mask: list[bool]) -> Sample:
        return Sample([self._ids[i] for i in ids], mask)

    def _eos(self) -> list[int]:
        return list(self.tokenizer.eos_ids[:1])

    def _refuse(self, *, kind: str, mask: str | None = None, overlong: str | None = None) -> None:
        for name, value in (("mask", mask), ("overlong", overlong)):
            if value is not None and getattr(self, name) == value:
                raise InvalidArgumentError(f'{name}="{value}" is not for {kind}; leave it out')


_ANCHORS = ("x", "。", "\n", ".", " ", "0", "\n\n", "Q:")
"""Texts that some text goes on from; the first whose last token stays as it is serves."""


def _blocks(text: str) -> Iterator[str]:
    """A text in parts that end with a line where one ends in time."""
    at = 0
    while at < len(text):
        end = at + BLOCK
        if end < len(text):
            end = text.rfind("\n", at, end) + 1 or end
        yield text[at:end]
        at = end


def _longest(samples: list[Sample]) -> int:
    return max(len(sample.ids) for sample in samples)


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InvalidArgumentError(f"{name} must be one of {', '.join(known)}, got {shown(value)}")
