"""Keeps what people type apart from the chat template's own marks.

A message may contain the name of a special token, such as `</s>`. In the rendered prompt it looks
like a mark of the template, so messages are rendered a second time with other characters in place
of those that such a name begins and ends with: whatever still reads as a name is the template's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from ..errors import TemplateError, TokenizerError

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None
Render = Callable[[Messages, Tools], str]
Change = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class PromptText:
    """Text to encode, and the names of special tokens in it that are ordinary text."""

    text: str
    typed: tuple[tuple[int, str], ...] = ()
    """Each name with the position of one of its characters, ascending."""

    def __add__(self, other: PromptText) -> PromptText:
        moved = tuple((at + len(self.text), name) for at, name in other.typed)
        return PromptText(self.text + other.text, self.typed + moved)

    def since(self, start: int) -> PromptText:
        """The text from `start` on."""
        later = tuple((at - start, name) for at, name in self.typed if at >= start)
        return PromptText(self.text[start:], later)

    def until(self, end: int) -> PromptText:
        """The text before `end`."""
        return PromptText(self.text[:end], tuple(item for item in self.typed if item[0] < end))

    @property
    def names(self) -> frozenset[str]:
        """The names that are ordinary text."""
        return frozenset(name for _, name in self.typed)


class MessageText:
    """Renders messages, and finds the names of special tokens that come from them.

    `special` tokens never show in a reply, so their names are ordinary text in every message.
    `written` are other tokens that the template writes, such as a `<tool_call>` that does show in
    replies: their names are ordinary text in all messages but the assistant's.
    """

    def __init__(self, special: Collection[str], written: Collection[str] = ()) -> None:
        self.special = frozenset(name for name in special if name.strip())
        self.names = self.special | {name for name in written if name.strip()}
        self._lengths = sorted({len(name) for name in self.names})
        self._in_replies, self._elsewhere = _pattern(self.special), _pattern(self.names)
        ends = list(dict.fromkeys(end for name in self.names for end in (name[0], name[-1])))
        if len(ends) > _BLOCK:
            raise TokenizerError(
                f"special tokens must begin and end with at most {_BLOCK} different characters, "
                f"found {len(ends)}; download the model's tokenizer again"
            )
        self._hidden_ends = [
            {ord(end): start + number for number, end in enumerate(ends)} for start in _BLOCKS
        ]
        self._shown: dict[int, int | None] = {
            hidden: end for table in self._hidden_ends for end, hidden in table.items()
        }
        self._shown_but_tracers = dict(self._shown)
        self._shown[ord(_TRACER)] = None

    def typed(self, text: str, role: str = "assistant") -> PromptText:
        """`text` as a message of `role` has it: the names in it are ordinary text."""
        pattern = self._in_replies if role == "assistant" else self._elsewhere
        return PromptText(text, tuple((match.start(), match[0]) for match in _each(pattern, text)))

    def render(self, render: Render, messages: Messages, tools: Tools = None) -> PromptText:
        """The prompt of `messages` and `tools`, by a template that may change them at will.

        TemplateError where it changes them so that a name's origin cannot be told.
        """
        try:
            return self._render(render, messages, tools)
        except RecursionError:
            raise TemplateError("the messages are nested too deeply; send flatter ones") from None

    def _render(self, render: Render, messages: Messages, tools: Tools) -> PromptText:
        text = render(messages, tools)
        if not self._elsewhere.search(text) or not _is_unicode(text):
            return PromptText(text)
        if not self._may_contain(messages, tools):
            return PromptText(text)
        read = _pattern(self._read_in_replies(render, messages, tools))
        wide, narrow = self._hide_ends, self._hide
        for hide in (wide, narrow, self._hide_last):
            rendered = _try(render, *self._hidden(messages, tools, hide, read))
            for hidden in [rendered, _unescaped(rendered)] if rendered is not None else ():
                if self._show(hidden) == text:
                    return self._find(hidden)
        # The template looks at such text, or rewrites it.
        trace = _trace(self._elsewhere), _trace(self._in_replies)
        traced = _try(render, *_changed(messages, tools, *trace))
        if traced is not None and self._show(traced) == text and not self._survives(traced):
            return PromptText(text)
        hidden, other = (
            render(*self._hidden(messages, tools, narrow, read, second)) for second in (0, 2)
        )
        if self._show(hidden) != self._show(other):
            raise TemplateError(
                "the chat template rewrites the names of special tokens in these messages, so that "
                "they cannot be told from its own marks; leave them out, or replace the model's "
                "chat_template"
            )
        return self._find(hidden)

    def _read_in_replies(self, render: Render, messages: Messages, tools: Tools) -> list[str]:
        """The names that the template looks for in replies, to write marks of its own for them.

        A `</think>` may end a thought that the template moves or leaves out. In other messages the
        template must not be misled by what was typed.
        """
        replies = [message for message in messages if message["role"] == "assistant"]
        found = {match[0] for text in _texts(replies) for match in _each(self._in_replies, text)}
        others = self._hide(_OTHERS, self._elsewhere)

        def rendered(*changes: Change) -> str | None:
            def in_replies(text: str) -> str:
                return reduce(lambda changed, change: change(changed), changes, text)

            text = _try(render, *_changed(messages, tools, others, in_replies))
            return None if text is None else _unescaped(text).translate(self._shown_but_tracers)

        def is_read(name: str) -> bool:
            pattern = _pattern([name])
            trace = _trace(pattern)
            # Both, since a template may look for a character: MiniCPM5's quotes arguments with a <.
            hides = (self._hide(_REPLIES, pattern), self._hide_last(_REPLIES, pattern))
            # A mark of the template's own where the reply had one shows by the tracer before it.
            return all(
                rendered() != rendered(hide) or rendered(trace) != rendered(trace, hide)
                for hide in hides
            )

        return [name for name in sorted(found) if is_read(name)]

    def _hidden(
        self,
        messages: Messages,
        tools: Tools,
        hide: Callable[[int, re.Pattern[str]], Change],
        read: re.Pattern[str],
        second: int = 0,
    ) -> tuple[Messages, Tools]:
        """Messages and tools with names hidden, but for those that are `read` in replies."""
        in_replies = hide(_REPLIES + second, self._in_replies)

        def in_reply(text: str) -> str:
            characters = list(in_replies(text))
            for match in _each(read, text):
                characters[slice(*match.span())] = match[0]
            return "".join(characters)

        return _changed(messages, tools, hide(_OTHERS + second, self._elsewhere), in_reply)

    def _may_contain(self, messages: Messages, tools: Tools) -> bool:
        """Whether a name in the rendered text could come from messages or tools."""
        return any(
            text.translate(self._hidden_ends[_OTHERS]) != text
            for text in _texts([*messages, *(tools or ())])
        )

    def _hide_ends(self, block: int, _: re.Pattern[str]) -> Change:
        """Hides every character that a name could begin or end with."""
        return lambda text: text.translate(self._hidden_ends[block])

    def _hide_last(self, block: int, names: re.Pattern[str]) -> Change:
        return self._hide(block, names, is_last=True)

    def _hide(self, block: int, names: re.Pattern[str], *, is_last: bool = False) -> Change:
        """Hides the first or the last character of each name."""

        def hidden(text: str) -> str:
            characters = list(text)
            for match in _each(names, text):
                at = match.end() - 1 if is_last else match.start()
                characters[at] = text[at].translate(self._hidden_ends[block])
            return "".join(characters)

        return lambda text: hidden(text) if names.search(text) else text

    def _show(self, hidden: str) -> str:
        return hidden.translate(self._shown)

    def _survives(self, traced: str) -> bool:
        """Whether a name in the rendered text has a mark before it."""
        starts = (match.start() for match in _each(self._elsewhere, traced))
        return any(traced[start - 1 : start] == _TRACER for start in starts)

    def _find(self, hidden: str) -> PromptText:
        """The text of `hidden`, and the names of which a character is hidden."""
        text = self._show(hidden)
        found: dict[int, str] = {}
        for match in _each(self._elsewhere, text):
            for length in self._lengths:
                name = match[0][:length]
                if len(name) < length or name not in self.names:
                    continue
                hides = _HIDDEN if name in self.special else _HIDDEN_IN_OTHERS
                if hit := hides.search(hidden, match.start(), match.start() + length):
                    found.setdefault(hit.start(), name)
        return PromptText(text, tuple(sorted(found.items())))


# Halves of surrogate pairs, which no text to encode has: blocks that stand for the ends of names in
# replies and in other messages, each in two alphabets, and a mark.
_BLOCK = 0x1F0
_BLOCKS = range(0xD800, 0xDFC0, _BLOCK)
_OTHERS, _REPLIES = 0, 1
_TRACER = "\udfff"
_HIDDEN = re.compile("[\ud800-\udfbf]")
_HIDDEN_IN_OTHERS = re.compile("[\ud800-\ud9ef\udbe0-\uddcf]")


def _pattern(names: Collection[str]) -> re.Pattern[str]:
    """Finds the longest of `names`; no names are never found."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _each(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """The longest match at each position; they may overlap."""
    start = 0
    while match := pattern.search(text, start):
        yield match
        start = match.start() + 1


def _trace(names: re.Pattern[str]) -> Change:
    """Puts a mark before each name."""

    def traced(text: str) -> str:
        starts = [match.start() for match in _each(names, text)]
        cuts = zip([0, *starts], [*starts, len(text)], strict=True)
        return _TRACER.join(text[start:end] for start, end in cuts)

    return traced


def _changed(
    messages: Messages, tools: Tools, change: Change, in_replies: Change
) -> tuple[list[dict[str, Any]], Tools]:
    """Messages and tools with all their texts changed, but for the usual roles."""
    return [
        {
            key: value if key == "role" and value in _ROLES else _mapped(value, own)
            for key, value in message.items()
        }
        for message in messages
        for own in [in_replies if message["role"] == "assistant" else change]
    ], _mapped(tools, change)


_ROLES = ("system", "user", "assistant", "tool")


def _texts(value: Any) -> Iterator[str]:
    """All texts in messages, but for the usual roles."""
    match value:
        case str():
            yield value
        case list() | tuple():
            for item in value:
                yield from _texts(item)
        case Mapping():
            for key, item in value.items():
                yield from _texts(key)
                if not (key == "role" and item in _ROLES):
                    yield from _texts(item)


def _mapped(value: Any, change: Change) -> Any:
    match value:
        case str():
            return change(value)
        case list() | tuple():
            return [_mapped(item, change) for item in value]
        case Mapping():
            return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    return value


def _unescaped(hidden: str) -> str:
    """Hidden characters that a template wrote as JSON's escapes, as characters."""
    return re.sub(r"\\u(d[89a-f][0-9a-f]{2})", lambda code: chr(int(code[1], 16)), hidden)


def _try(render: Render, messages: Messages, tools: Tools) -> str | None:
    try:
        return render(messages, tools)
    except TemplateError:
        return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
