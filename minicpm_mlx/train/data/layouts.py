"""Recognises the layout of a row by its fields, and reads the row into an example.

Layouts of a conversation: chat messages (OpenAI, OpenBMB), ShareGPT, Alpaca (as LLaMA-Factory reads
it), prompt and completion, OpenBMB's input and output, plain text. A preference adds `chosen` and
`rejected` to the prompt of one of them; a `label` (TRL) or `kto_tag` (LLaMA-Factory) marks a
single judged reply.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ...errors import DataError
from ...files.rows import kind, listed
from .examples import Conversation, Document, Example, Judged, Preference, TemplateOptions
from .messages import (
    NOTHING,
    THOUGHTS,
    UNLEARNED,
    Message,
    check_calls,
    check_roles,
    is_blank,
    parse_message,
    parse_messages,
    parse_text,
    parse_thought,
    split_marks,
)
from .tools import check_texts, parse_object, parse_tools

RowValue = Mapping[str, Any]


@dataclass(frozen=True)
class Format:
    """A recognised layout."""

    name: str
    """For messages to the user."""
    kind: str
    """The kind of training it serves: "sft", "preference" or "kto"."""
    fields: frozenset[str]
    """Fields that are read."""
    read: Callable[[RowValue], Example]
    """Reads a row. A DataError names the wrong field; the caller adds file and line."""

    @property
    def is_text(self) -> bool:
        """Whether rows are plain text."""
        return self.name == _TEXT


def recognise(row: RowValue) -> Format:
    """Returns the layout of a row; DataError if it has none."""
    for name in _UNSUPPORTED:
        if row.get(name) and row[name] not in NOTHING:
            raise DataError(f"{name}: expected text alone, found {name}; remove such samples")
    layout = _recognise(row)
    fields = OF_TEMPLATE if not layout.is_text else ()
    _check_read(row, layout, fields)
    return replace(layout, fields=layout.fields.union(fields))


def _recognise(row: RowValue) -> Format:
    if "chosen" in row or "rejected" in row:
        return _preference_format(row)
    for layout in _LAYOUTS:
        if layout.needs <= row.keys():
            tag = next((tag for tag in _TAGS if tag in row), None)
            is_judged = tag is not None and not layout.ignores(tag)
            return layout.judged(tag) if tag and is_judged else layout.plain
    raise DataError(_missing(row))


def _check_read(row: RowValue, layout: Format, fields: Collection[str]) -> None:
    """Raises DataError for a field that would change what is learned and that is not read."""
    for name in (*OF_TEMPLATE, *THOUGHTS):
        if row.get(name) not in NOTHING and name not in layout.fields.union(fields):
            where = "write it into the messages" if name in THOUGHTS else "give conversations"
            raise DataError(
                f"{name}: expected no such field beside {listed(sorted(layout.fields))}, as it is "
                f"not read there; {where}, or remove it"
            )


def _options(row: RowValue) -> TemplateOptions:
    """The tools of a row, and the variables of the template that TRL has in a field of its own."""
    tools = [(name, row[name]) for name in ("tools", "functions") if row.get(name) not in NOTHING]
    if len(tools) > 1:
        raise DataError("functions: expected tools or functions, found both; remove one")
    variables = row.get("chat_template_kwargs")
    name = "chat_template_kwargs"
    found = {} if variables in NOTHING else parse_object(variables, name)
    check_texts(found, name)
    return TemplateOptions(
        tuple(tool for field, value in tools for tool in parse_tools(value, field)),
        {key: value for key, value in found.items() if value is not None},
    )


_UNSUPPORTED = ("images", "image", "videos", "audios")
OF_TEMPLATE = ("tools", "functions", "chat_template_kwargs")
"""Fields that go to the template beside the messages."""
_TAGS = ("kto_tag", "label")


# One conversation


def _from_messages(row: RowValue) -> list[Message]:
    return parse_messages(row["messages"], "messages")


def _from_sharegpt(row: RowValue) -> list[Message]:
    return _with_system(_system(row), parse_messages(row["conversations"], "conversations"))


def _from_alpaca(row: RowValue, *, prompt: str = "instruction") -> list[Message]:
    """Joins the instruction and the input with a line break."""
    text = "\n".join(filter(None, [_optional(row, prompt), _optional(row, "input")]))
    content = parse_text(text, prompt if prompt in row else "input")
    return [*_system(row), *_history(row), {"role": "user", "content": content}]


def _from_prompt(row: RowValue, *, prompt: str) -> list[Message]:
    """The prompt is a text, or a list of messages."""
    if isinstance(row[prompt], list):
        return _with_system(_system(row), parse_messages(row[prompt], prompt))
    return [*_system(row), {"role": "user", "content": parse_text(row[prompt], prompt)}]


def _system(row: RowValue) -> list[Message]:
    text = _optional(row, "system")
    return [{"role": "system", "content": text}] if text else []


def _with_system(before: list[Message], messages: list[Message]) -> list[Message]:
    """The messages after the system message `before`, if any, which may repeat their own."""
    if before and messages and messages[0]["role"] == "system":
        if messages[0]["content"] != before[0]["content"]:
            raise DataError(
                "system: expected the text of the conversation's own system message, found another "
                "text; remove one of them"
            )
        return messages
    return before + messages


def _optional(row: RowValue, name: str) -> str:
    """Returns a field's text, "" if it is absent, null or blank."""
    value = row.get(name)
    return "" if is_blank(value) else parse_text(value, name)


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

    def conversation(self, row: RowValue, is_good: bool = True) -> Conversation:
        messages, options = self.opening(row), _options(row)
        if self.reply is not None:
            messages += _with_thought(_reply_messages(row[self.reply], self.reply), row)
        messages, unlearned = split_marks(check_roles(messages))
        bad = {len(messages) - 1} if not is_good else set()
        check_calls(messages, options.tools, unlearned | bad)
        return Conversation(messages, unlearned, options)

    def ignores(self, tag: str) -> bool:
        """Whether `tag` is an unrelated field, as `label` in data for classification."""
        return self.name == _TEXT or (tag == "label" and self.name in (_ALPACA, _INPUT))

    @property
    def plain(self) -> Format:
        if self.name == _TEXT:
            return Format(_TEXT, "sft", self.needs, _read_document)
        return Format(self.name, "sft", self.fields, self.conversation)

    @property
    def fields(self) -> frozenset[str]:
        thoughts = () if self.reply is None else THOUGHTS
        return self.needs.union(self.optional, thoughts)

    def judged(self, tag: str) -> Format:
        def read(row: RowValue) -> Example:
            if not isinstance(row[tag], bool):
                raise DataError(
                    f"{tag}: expected true or false, found {kind(row[tag])}; "
                    "correct it, or remove the field if these are no judged replies"
                )
            conversation = self.conversation(row, row[tag])
            if len(conversation.messages) - 1 in conversation.unlearned:
                raise _unlearned("the last reply")
            return Judged(conversation.messages, row[tag], conversation.options)

        return Format(f"{self.name} with {tag} (KTO)", "kto", self.fields | {tag}, read)


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


def _missing(row: RowValue) -> str:
    """The error for a row of no layout: what lacks beside a field that it has, or all layouts."""
    names = listed(row) or "none"
    for name in row:
        others = {o for layout in _LAYOUTS if name in layout.needs for o in layout.needs - {name}}
        if others:
            lacking = " or ".join(sorted(others))
            return f"expected {lacking} beside {name}, found {names}; add it, or rename the fields"
    inner = next((name for name, value in row.items() if _are_objects(value)), None)
    if inner is not None:
        return f"expected one sample, found a list of objects in {listed([inner])}; make each a row"
    needs = [" and ".join(sorted(layout.needs)) for layout in _LAYOUTS]
    expected = ", or ".join([*needs, "chosen and rejected"])
    return f"expected the fields {expected}; found {names}; rename the fields"


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


# Two replies


_OPENINGS: dict[str, _Layout] = {
    name: layout for layout in reversed(_LAYOUTS) for name in layout.needs - {layout.reply, "text"}
}
"""The layout whose opening is the prompt of two replies, by the field that holds it."""


def _preference_format(row: RowValue) -> Format:
    for name in ("chosen", "rejected"):
        if name not in row:
            raise DataError(f"{name}: expected both chosen and rejected, found no {name}; add it")
    opening = next((name for name in reversed(_OPENINGS) if name in row), "")
    name = f"preference pairs ({opening}, chosen, rejected)" if opening else "preference pairs"
    fields = frozenset({"system"})
    if opening:
        fields = _OPENINGS[opening].optional | {opening}
    fields |= {"chosen", "rejected"}
    return Format(name, "preference", fields, lambda row: _read_preference(row, opening))


def _read_preference(row: RowValue, opening: str) -> Preference:
    before = _OPENINGS[opening].opening(row) if opening else _system(row)
    chosen, rejected = (_reply_messages(row[name], name) for name in ("chosen", "rejected"))
    if any(UNLEARNED in replies[-1] for replies in (chosen, rejected)):
        raise _unlearned("a reply")
    before, chosen, rejected = (split_marks(each)[0] for each in (before, chosen, rejected))
    if before[-1:] in (chosen[-1:], rejected[-1:]):  # `messages` of UltraFeedback: chosen again
        before = before[:-1]
    if chosen[:-1] != rejected[:-1]:
        raise DataError(
            "rejected: expected the messages of chosen up to the last one, found others; "
            "both must answer one prompt"
        )
    prompt = _merge_prompts(before, chosen[:-1], opening)
    if all(message["role"] == "system" for message in prompt):
        raise DataError(
            "prompt: expected the question that chosen and rejected answer, found none; add a "
            "field prompt, or write chosen and rejected as whole conversations"
        )
    options = _options(row)
    for name, replies in (("chosen", chosen), ("rejected", rejected)):
        check_roles([*prompt, replies[-1]], name)
    if chosen[-1] == rejected[-1]:
        raise DataError(
            "rejected: expected another reply than chosen, found the same; remove such samples"
        )
    check_calls([*prompt, chosen[-1]], options.tools)  # the rejected reply may be a wrong call
    return Preference(prompt, chosen[-1], rejected[-1], options)


def _unlearned(what: str) -> DataError:
    return DataError(f"expected {what} to be learned, found it marked not to be; remove the sample")


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
    return _with_system(before[: len(before) - len(prompt)], shared)


def _with_thought(messages: list[Message], row: RowValue) -> list[Message]:
    """The messages of a reply with the thought that has a field of its own in the row."""
    thought, last = parse_thought(row), messages[-1]
    if thought and last.get("reasoning_content", thought) != thought:
        raise DataError("reasoning_content: expected the reply's own, found another; remove one")
    return [*messages[:-1], {**last, "reasoning_content": thought}] if thought else messages


def _reply_messages(value: Any, name: str) -> list[Message]:
    """Parses a reply: a text, a message, or a list of messages that ends with it."""
    if isinstance(value, dict):
        return [parse_message(value, name)]
    if isinstance(value, list):
        return parse_messages(value, name)
    return [{"role": "assistant", "content": parse_text(value, name)}]
