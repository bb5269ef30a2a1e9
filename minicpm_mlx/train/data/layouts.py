"""Recognises the layout of a row by its fields, and reads the row into an example.

Layouts of a conversation: chat messages (OpenAI, OpenBMB), ShareGPT, Alpaca (as LLaMA-Factory reads
it), prompt and completion, OpenBMB's input and output, plain text. A preference adds `chosen` and
`rejected` to the prompt of one of them; a `label` (TRL) or `kto_tag` (LLaMA-Factory) marks a
single judged reply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...errors import DataError
from ...files.rows import kind, listed
from .messages import Message, check_roles, parse_message, parse_messages, parse_text

RowValue = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation whose assistant messages are learned."""

    messages: list[Message]
    """User and assistant alternate and the assistant is last; a system message may come first."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is learned whole."""

    text: str


@dataclass(frozen=True, slots=True)
class Preference:
    """Two replies to one prompt, the first preferred."""

    prompt: list[Message]
    """All messages before the reply; the user's is last."""
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Judged:
    """A conversation whose last reply is good or bad."""

    messages: list[Message]
    good: bool


Example = Conversation | Document | Preference | Judged


@dataclass(frozen=True)
class Format:
    """A recognised layout."""

    name: str
    """For messages to the user."""
    kind: str
    """The kind of training it serves: "sft", "preference" or "kto"."""
    fields: frozenset[str]
    """Fields that are read; others are ignored."""
    read: Callable[[RowValue], Example]
    """Reads a row. A DataError names the wrong field; the caller adds file and line."""


def recognise(row: RowValue) -> Format:
    """Returns the layout of a row; DataError if it has none."""
    for name in _UNSUPPORTED:
        if row.get(name):
            raise DataError(f"{name}: expected text alone, found {name}; remove such samples")
    if "chosen" in row or "rejected" in row:
        return _preference_format(row)
    for layout in _LAYOUTS:
        if layout.needs <= row.keys():
            tag = next((tag for tag in _TAGS if tag in row), None)
            is_judged = tag is not None and not layout.ignores(tag)
            return layout.judged(tag) if tag and is_judged else layout.plain
    raise DataError(
        f"expected the fields {_expected()}; found {listed(row) or 'none'}; rename the fields"
    )


_UNSUPPORTED = ("tools", "functions", "images", "videos", "audios")
_TAGS = ("kto_tag", "label")


# One conversation


def _from_messages(row: RowValue) -> list[Message]:
    return parse_messages(row["messages"], "messages")


def _from_sharegpt(row: RowValue) -> list[Message]:
    return [*_system(row), *parse_messages(row["conversations"], "conversations")]


def _from_alpaca(row: RowValue, *, prompt: str = "instruction") -> list[Message]:
    """Joins the instruction and the input with a line break."""
    text = "\n".join(filter(None, [_optional(row, prompt), _optional(row, "input")]))
    content = parse_text(text, prompt if prompt in row else "input")
    return [*_system(row), *_history(row), {"role": "user", "content": content}]


def _from_prompt(row: RowValue, *, prompt: str) -> list[Message]:
    """The prompt is a text, or a list of messages."""
    if isinstance(row[prompt], list):
        return [*_system(row), *parse_messages(row[prompt], prompt)]
    return [*_system(row), {"role": "user", "content": parse_text(row[prompt], prompt)}]


def _system(row: RowValue) -> list[Message]:
    text = _optional(row, "system")
    return [{"role": "system", "content": text}] if text else []


def _optional(row: RowValue, name: str) -> str:
    """Returns a field's text, "" if it is absent, null or blank."""
    value = row.get(name)
    if value is None or (isinstance(value, str) and not value.strip()):
        return ""
    return parse_text(value, name)


def _history(row: RowValue) -> list[Message]:
    """LLaMA-Factory's earlier turns: a list of [question, answer]."""
    history = row.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"history: expected a list of pairs, found {kind(history)}; correct it")
    messages: list[Message] = []
    for index, pair in enumerate(history):
        name = f"history[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{name}: expected [question, answer], found {kind(pair)}; correct it")
        messages.append({"role": "user", "content": parse_text(pair[0], f"{name}[0]")})
        messages.append({"role": "assistant", "content": parse_text(pair[1], f"{name}[1]")})
    return messages


@dataclass(frozen=True)
class _Layout:
    """One way to write down a conversation."""

    name: str
    opening: Callable[[RowValue], list[Message]]
    """Reads all messages but those of `reply`."""
    needs: frozenset[str]
    optional: frozenset[str] = frozenset()
    reply: str | None = None
    """The field of the last reply, if it has its own."""

    def messages(self, row: RowValue) -> list[Message]:
        messages = self.opening(row)
        if self.reply is not None:
            messages += _reply_messages(row[self.reply], self.reply)
        return check_roles(messages)

    def ignores(self, tag: str) -> bool:
        """Whether `tag` is an unrelated field, as `label` in data for classification."""
        return self.name == _TEXT or (tag == "label" and self.name in (_ALPACA, _INPUT))

    @property
    def plain(self) -> Format:
        if self.name == _TEXT:
            return Format(_TEXT, "sft", self.needs, _read_document)
        fields = self.needs | self.optional
        return Format(self.name, "sft", fields, lambda row: Conversation(self.messages(row)))

    def judged(self, tag: str) -> Format:
        def read(row: RowValue) -> Example:
            if not isinstance(row[tag], bool):
                raise DataError(
                    f"{tag}: expected true or false, found {kind(row[tag])}; "
                    "correct it, or remove the field if these are no judged replies"
                )
            return Judged(self.messages(row), row[tag])

        fields = self.needs | self.optional | {tag}
        return Format(f"{self.name} with {tag} (KTO)", "kto", fields, read)


def _read_document(row: RowValue) -> Document:
    if isinstance(row["text"], list):
        raise DataError("text: expected text, found a list; correct it")
    return Document(parse_text(row["text"], "text"))


_ALPACA, _INPUT, _TEXT = "Alpaca", "input and output", "plain text"


def _prompt_and_reply(prompt: str, reply: str) -> _Layout:
    return _Layout(
        f"{prompt} and {reply}",
        partial(_from_prompt, prompt=prompt),
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
    _prompt_and_reply("prompt", "completion"),
    _prompt_and_reply("prompt", "response"),
    _prompt_and_reply("question", "answer"),
    _prompt_and_reply("query", "response"),
    _Layout(
        _INPUT,
        partial(_from_alpaca, prompt="prompt"),
        frozenset({"input", "output"}),
        frozenset({"prompt", "system", "history"}),
        "output",
    ),
    _Layout(_TEXT, lambda row: [], frozenset({"text"})),
)
"""The most specific first: rows often repeat their text in another field."""


def _expected() -> str:
    needs = [" and ".join(sorted(layout.needs)) for layout in _LAYOUTS]
    return ", or ".join([*needs, "chosen and rejected"])


# Two replies


_OPENINGS: dict[str, Callable[[RowValue], list[Message]]] = {
    "messages": _from_messages,
    "conversations": _from_sharegpt,
    "instruction": _from_alpaca,
    "prompt": partial(_from_prompt, prompt="prompt"),
    "question": partial(_from_prompt, prompt="question"),
    "query": partial(_from_prompt, prompt="query"),
}
"""Reads the prompt of two replies, by the field that holds it."""


def _preference_format(row: RowValue) -> Format:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise DataError(f"{name}: expected both chosen and rejected, found no {name}; add it")
    opening = next((name for name in _OPENINGS if name in row), "")
    name = f"preference pairs ({opening}, chosen, rejected)" if opening else "preference pairs"
    fields = frozenset({"chosen", "rejected", "system", "input", "history", opening})
    return Format(name, "preference", fields, lambda row: _read_preference(row, opening))


def _read_preference(row: RowValue, opening: str) -> Preference:
    before = _OPENINGS[opening](row) if opening else _system(row)
    chosen, rejected = (_reply_messages(row[name], name) for name in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise DataError(
            "rejected: expected the messages of chosen up to the last one, found others; "
            "both must answer one prompt"
        )
    prompt = _merge_prompts(before, chosen[:-1], opening)
    check_roles([*prompt, chosen[-1]], "chosen")
    check_roles([*prompt, rejected[-1]], "rejected")
    if chosen[-1] == rejected[-1]:
        raise DataError(
            "rejected: expected another reply than chosen, found the same; remove such samples"
        )
    return Preference(prompt, chosen[-1]["content"], rejected[-1]["content"])


def _merge_prompts(before: list[Message], shared: list[Message], opening: str) -> list[Message]:
    """Returns the full prompt; `shared` is the conversation that both replies repeat, if any."""
    if not shared:
        return before
    prompt, repeated = (
        [message for message in messages if message["role"] != "system"]
        for messages in (before, shared)
    )
    if prompt and prompt != repeated and prompt[0] not in repeated[len(prompt) - 1 :]:
        raise DataError(
            f"{opening}: expected what comes before the last message of chosen, found another "
            "text; correct it or remove the field"
        )
    if repeated != shared:  # it has its own system message
        return shared
    return [*before[: len(before) - len(prompt)], *shared]


def _reply_messages(value: Any, name: str) -> list[Message]:
    """Parses a reply: a text, a message, or a list of messages that ends with it."""
    if isinstance(value, dict):
        return [parse_message(value, name)]
    if isinstance(value, list):
        return parse_messages(value, name)
    return [{"role": "assistant", "content": parse_text(value, name)}]
