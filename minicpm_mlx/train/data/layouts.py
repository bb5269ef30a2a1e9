"""Rows to examples: which of the known layouts a row has is told by its fields.

Layouts of one conversation: chat messages (OpenAI's, OpenBMB's), ShareGPT, Alpaca (LLaMA-Factory's
reading of it), prompt and completion, OpenBMB's input and output, plain text. A preference is the
beginning of one of them with `chosen` and `rejected`; with a `label` (TRL) or `kto_tag`
(LLaMA-Factory) it is one reply that someone judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import DataError
from ...files.rows import kind, listed
from .messages import (
    Message,
    checked,
    plain,
    turn,
    turns,
    words,
)

__all__ = ["Conversation", "Document", "Example", "Format", "Judged", "Preference", "recognise"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns to learn the assistant's part of."""

    messages: list[Message]
    """User and assistant by turns, the assistant last; before them perhaps a system text."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text to learn all of."""

    text: str


@dataclass(frozen=True, slots=True)
class Preference:
    """Two replies, one of them better."""

    prompt: list[Message]
    """All that comes before, the user last."""
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Judged:
    """A conversation whose last reply is good, or bad."""

    messages: list[Message]
    good: bool


Example = Conversation | Document | Preference | Judged


@dataclass(frozen=True)
class Format:
    """A layout of rows."""

    name: str
    """For people."""
    kind: str
    """What it trains: "sft", "preference" or "kto"."""
    fields: frozenset[str]
    """What is read of a row; other fields are left alone."""
    read: Callable[[Mapping[str, Any]], Example]
    """A row's example; DataError, without the place, names the field that is wrong."""


def recognise(row: Mapping[str, Any]) -> Format:
    """The layout of a row; DataError where it has none of them."""
    for name in _UNSUPPORTED:
        if row.get(name):
            raise DataError(f"{name}: expected text alone, found {name}; remove such samples")
    if "chosen" in row or "rejected" in row:
        return _preference(row)
    for layout in _LAYOUTS:
        if layout.needs <= row.keys():
            tag = next((tag for tag in _TAGS if tag in row), None)
            return layout.plain if tag is None or layout.untagged(tag) else layout.tagged(tag)
    raise DataError(
        f"expected the fields {_expected()}; found {listed(row) or 'none'}; rename the fields"
    )


_UNSUPPORTED = ("tools", "functions", "images", "videos", "audios")
_TAGS = ("kto_tag", "label")


# One conversation


def _from_messages(row: Mapping[str, Any]) -> list[Message]:
    return turns(row["messages"], "messages")


def _from_sharegpt(row: Mapping[str, Any]) -> list[Message]:
    return [*_system(row), *turns(row["conversations"], "conversations")]


def _from_alpaca(row: Mapping[str, Any], *, prompt: str = "instruction") -> list[Message]:
    """The instruction and, on a line of its own, the input."""
    text = "\n".join(filter(None, [_optional(row, prompt), _optional(row, "input")]))
    asked = words(text, prompt if prompt in row else "input")
    return [*_system(row), *_history(row), {"role": "user", "content": asked}]


def _from_pair(prompt: str, row: Mapping[str, Any]) -> list[Message]:
    """What was asked: a text, or the messages so far."""
    if isinstance(row[prompt], list):
        return [*_system(row), *turns(row[prompt], prompt)]
    return [*_system(row), {"role": "user", "content": words(row[prompt], prompt)}]


def _system(row: Mapping[str, Any]) -> list[Message]:
    text = _optional(row, "system")
    return [{"role": "system", "content": text}] if text else []


def _optional(row: Mapping[str, Any], name: str) -> str:
    """A field's text, "" where it is absent, null or blank."""
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return words(value, name)


def _history(row: Mapping[str, Any]) -> list[Message]:
    """LLaMA-Factory's earlier turns: pairs of a question and its answer."""
    history = row.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"history: expected a list of pairs, found {kind(history)}; correct it")
    found: list[Message] = []
    for number, pair in enumerate(history):
        name = f"history[{number}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{name}: expected [question, answer], found {kind(pair)}; correct it")
        found.append({"role": "user", "content": words(pair[0], f"{name}[0]")})
        found.append({"role": "assistant", "content": words(pair[1], f"{name}[1]")})
    return found


@dataclass(frozen=True)
class _Layout:
    """One way to write a conversation down."""

    name: str
    opening: Callable[[Mapping[str, Any]], list[Message]]
    """All messages of a row, without those of `reply`."""
    needs: frozenset[str]
    optional: frozenset[str] = frozenset()
    reply: str | None = None
    """The field of the last turn, where it has one of its own."""

    def messages(self, row: Mapping[str, Any]) -> list[Message]:
        opening = self.opening(row)
        if self.reply is None:
            return checked(opening)
        if isinstance(row[self.reply], list):
            return checked([*opening, *turns(row[self.reply], self.reply)])
        text = words(row[self.reply], self.reply)
        return checked([*opening, {"role": "assistant", "content": text}])

    def untagged(self, tag: str) -> bool:
        """Whether `label` is but a field of somebody's own, as in data for classification."""
        return self.name == _TEXT or (tag == "label" and self.name in (_ALPACA, _INPUT))

    @property
    def plain(self) -> Format:
        if self.name == _TEXT:
            return Format(_TEXT, "sft", self.needs, lambda row: Document(plain(row["text"])))
        fields = self.needs | self.optional
        return Format(self.name, "sft", fields, lambda row: Conversation(self.messages(row)))

    def tagged(self, tag: str) -> Format:
        def read(row: Mapping[str, Any]) -> Example:
            if not isinstance(row[tag], bool):
                raise DataError(
                    f"{tag}: expected true or false, found {kind(row[tag])}; "
                    "correct it, or remove the field if these are no judged replies"
                )
            return Judged(self.messages(row), row[tag])

        fields = self.needs | self.optional | {tag}
        return Format(f"{self.name} with {tag} (KTO)", "kto", fields, read)


_ALPACA, _INPUT, _TEXT = "Alpaca", "input and output", "plain text"


def _pair(prompt: str, reply: str) -> _Layout:
    return _Layout(
        f"{prompt} and {reply}",
        lambda row: _from_pair(prompt, row),
        frozenset({prompt, reply}),
        frozenset({"system"}),
        reply,
    )


_LAYOUTS = (
    _Layout("chat messages", _from_messages, frozenset({"messages"})),
    _Layout("ShareGPT", _from_sharegpt, frozenset({"conversations"}), frozenset({"system"})),
    _Layout(
        _ALPACA,
        _from_alpaca,
        frozenset({"instruction", "output"}),
        frozenset({"input", "system", "history"}),
        "output",
    ),
    _pair("prompt", "completion"),
    _pair("prompt", "response"),
    _pair("question", "answer"),
    _pair("query", "response"),
    _Layout(
        _INPUT,
        lambda row: _from_alpaca(row, prompt="prompt"),
        frozenset({"input", "output"}),
        frozenset({"prompt", "system", "history"}),
        "output",
    ),
    _Layout(_TEXT, lambda row: [], frozenset({"text"})),
)
"""The more telling first: a row often carries its text a second time in another field."""


def _expected() -> str:
    needs = [" and ".join(sorted(layout.needs)) for layout in _LAYOUTS]
    return ", or ".join([*needs, "chosen and rejected"])


# Two replies


_OPENINGS: dict[str, Callable[[Mapping[str, Any]], list[Message]]] = {
    "messages": _from_messages,
    "conversations": _from_sharegpt,
    "instruction": _from_alpaca,
    "prompt": lambda row: _from_pair("prompt", row),
    "question": lambda row: _from_pair("question", row),
    "query": lambda row: _from_pair("query", row),
}
"""What comes before the two replies, by the field that holds it."""


def _preference(row: Mapping[str, Any]) -> Format:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise DataError(f"{name}: expected both chosen and rejected, found no {name}; add it")
    opening = next((name for name in _OPENINGS if name in row), None)
    name = f"preference pairs ({opening}, chosen, rejected)" if opening else "preference pairs"
    fields = {"chosen", "rejected", "system", "input", "history"} | ({opening} if opening else {""})
    return Format(name, "preference", frozenset(fields), lambda row: _two_replies(row, opening))


def _two_replies(row: Mapping[str, Any], opening: str | None) -> Preference:
    before = _OPENINGS[opening](row) if opening else _system(row)
    good, bad = (_reply_messages(row[name], name) for name in ("chosen", "rejected"))
    if good[:-1] != bad[:-1]:
        raise DataError(
            "rejected: expected the turns of chosen up to the last one, found others; "
            "both must answer one prompt"
        )
    prompt = _whole(before, good[:-1], opening or "")
    checked([*prompt, good[-1]], "chosen")
    checked([*prompt, bad[-1]], "rejected")
    if good[-1] == bad[-1]:
        raise DataError(
            "rejected: expected another reply than chosen, found the same; remove such samples"
        )
    return Preference(prompt, good[-1]["content"], bad[-1]["content"])


def _whole(before: list[Message], shared: list[Message], opening: str) -> list[Message]:
    """The prompt, where both replies may come with the conversation they end: `shared`."""
    if not shared:
        return before
    asked = [message for message in before if message["role"] != "system"]
    said = [message for message in shared if message["role"] != "system"]
    if asked and asked != said and asked[0] not in said[len(asked) - 1 :]:
        raise DataError(
            f"{opening}: expected what comes before the last turn of chosen, found another text; "
            "correct it or remove the field"
        )
    return shared if said != shared else [*before[: len(before) - len(asked)], *shared]


def _reply_messages(value: Any, name: str) -> list[Message]:
    """A reply as text, as one message, or as the messages that end with it."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": words(value, name)}]
    if isinstance(value, dict):
        return [turn(value, name)]
    return turns(value, name)
