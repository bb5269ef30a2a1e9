"""Reads a reply's parts as they come: thought, text, and calls of functions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol
from uuid import uuid4

from ...text.thinking import ThinkingForm, overlap
from .formats import BlockText, CallText, Steps, ToolFormat

MARK = "\udfff"
"""In text, before the name of a token that opens calls: half a surrogate pair, which no decoded
text has, so that no text can be taken for the token."""


@dataclass(frozen=True)
class ToolCall:
    """A call that a model wrote."""

    name: str
    arguments: str
    """An object as JSON text."""
    id: str = field(default_factory=lambda: f"call_{uuid4().hex}")

    def message(self) -> dict[str, Any]:
        """The call as a message of the conversation has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Thought:
    """A part of what a model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """The next part of a call, which the model may still write."""

    id: str
    name: str
    arguments: str
    """More of the JSON text, which only grows."""
    begins: bool
    """Whether it is the first part."""


Part = str | Thought | CallDelta | ToolCall
"""Of a reply: text, thought, a part of a call, or a whole call after all of its parts."""


def _append(parts: list[Part], part: Part) -> None:
    """Adds a part; to the one before where both are of one call."""
    last = parts[-1] if parts else None
    if isinstance(last, CallDelta) and isinstance(part, CallDelta) and last.id == part.id:
        parts[-1] = replace(last, arguments=last.arguments + part.arguments)
    else:
        parts.append(part)


class ReplyPart(Protocol):
    """The next part of a reply."""

    @property
    def text(self) -> str:
        """Text of the answer."""

    @property
    def thinking(self) -> str:
        """Text of the thought before it."""

    @property
    def finish_reason(self) -> str | None:
        """In the last part."""

    @property
    def stopped_by(self) -> str | None:
        """In the last part: the stop string that was found."""


def names_none(parameters: Mapping[str, Any]) -> bool:
    """Whether the schema of a function's arguments names no parameter."""
    naming = ("properties", "patternProperties", "required", "$ref", "allOf", "anyOf", "oneOf")
    return not any(parameters.get(keyword) for keyword in naming)


class CallReader:
    """Splits a reply into its parts as it arrives; an invalid call stays text.

    Without a format all of the answer is text. A thought has no calls. Of a block of several calls
    the first alone counts where `parallel` is False. With `streams` the parts of a call come as it
    is written: for replies whose calls a grammar holds valid, since nothing can be taken back.
    Where a token opens calls (`by_token`), its name counts after MARK alone.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        functions: Mapping[str, Any],
        marks: ThinkingForm | None = None,
        *,
        parallel: bool = True,
        streams: bool = False,
        by_token: bool = False,
    ):
        self.format, self.functions, self.marks = tool_format, functions, marks
        self.mark = MARK if by_token else ""
        self.parallel, self.streams = parallel, streams
        self.source = BlockText("")
        self.steps: Steps | None = None
        """Of the block from which parts have come, up to its end."""
        self.open: ToolCall | None = None
        """The call that parts have come of, as far as it is written."""
        self.has_called = False
        self.in_thought = False
        self.pending = ""
        self.space: str | None = None
        """After a call: the white space since, which counts if text follows."""

    def read(self, part: ReplyPart) -> list[Part]:
        """The thought, the text and the calls that are complete with `part`."""
        pieces = self._thought(part) if part.thinking or self.in_thought else []
        pieces += self.add(part.text)
        return pieces + self.finish(part.stopped_by) if part.finish_reason else pieces

    def _thought(self, part: ReplyPart) -> list[Part]:
        if self.marks is None:
            return [Thought(part.thinking)]
        opening = "" if self.in_thought else f"{self.marks.opening}\n"
        ends = bool(part.text)
        self.in_thought = not ends
        text = opening + part.thinking + (f"\n{self.marks.closing}\n\n" if ends else "")
        return [text] if text else []

    def add(self, text: str) -> list[Part]:
        if self.format is None:
            return [text] if text else []
        pieces: list[Part] = []
        if self.steps:
            self.source.text += text
            pieces += self._grow()
        else:
            self.pending += text
        opening = self.mark + self.format.opening
        ends = self.streams or self.format.closing[-1] in text
        if self.pending.startswith(opening) and not ends:
            return pieces  # still within a block: looking for its end takes time
        while (start := self.pending.find(opening)) >= 0:
            self._take_text(pieces, start)
            if self.format.begins_tag and self.pending[len(opening) :][:1].strip():
                self._take_text(pieces, len(opening))
                continue
            if self.streams and self._begin():
                pieces += self._grow()
                continue
            block = self.pending[len(self.mark) :]
            end = self.format.end(block)
            if end < 0:
                return pieces
            pieces += self._parse(self.format, block[:end])
            self.pending = block[end:]
        self._take_text(pieces, len(self.pending) - overlap(self.pending, opening))
        return pieces

    def _begin(self) -> bool:
        """Whether parts can come of the block that begins `pending`, which is taken out then."""
        assert self.format is not None
        source = BlockText(self.pending[len(self.mark) :])
        steps = self.format.steps(source, self.functions)
        try:
            first = next(steps, None)
        except ValueError:
            first = None
        if first is None:
            return False
        self.source, self.steps, self.pending = source, chain([first], steps), ""
        return True

    def _grow(self) -> list[Part]:
        """Reads on in the block of `steps`; what follows it becomes `pending`."""
        pieces: list[Part] = []
        try:
            for step in self.steps or ():
                if step is None:
                    return pieces
                if self.parallel or not self.has_called:
                    for part in self._grow_call(step):
                        _append(pieces, part)
        except ValueError:
            pass  # in another layout than the grammar's: what follows is text
        self.steps, self.pending, self.space = None, self.source.text, ""
        return pieces

    def _grow_call(self, step: CallText) -> Iterator[Part]:
        call, begins = self.open or ToolCall(step.name, ""), self.open is None
        self.open = replace(call, arguments=call.arguments + step.arguments)
        yield CallDelta(call.id, call.name, step.arguments, begins)
        if step.ends:
            yield self.open
            self.open, self.has_called = None, True

    def finish(self, stopped_by: str | None = None) -> list[Part]:
        """The rest at the end of the reply; the stop string may have cut the end of a call off."""
        pieces: list[Part] = []
        form = self.format
        if form and self.steps and stopped_by == form.closing:
            return self.add(form.closing)
        if (
            form
            and self.pending.startswith(self.mark + form.opening)
            and stopped_by == form.closing
        ):
            text, self.pending = self.pending[len(self.mark) :], ""
            return [*self._parse(form, text + form.closing)]
        self._take_text(pieces, len(self.pending))
        return pieces

    def _take_text(self, pieces: list[Part], length: int) -> None:
        """Moves the first characters to `pieces`. White space alone after a call is left out."""
        taken, self.pending = self.pending[:length], self.pending[length:]
        text = (self.space or "") + (taken.replace(self.mark, "") if self.mark else taken)
        if self.space is not None and not text.strip():
            self.space = text
        elif text:
            pieces.append(text)
            self.space = None

    def _parse(self, tool_format: ToolFormat, block: str) -> list[Part]:
        """The calls of a block, or its text."""
        block = block.replace(self.mark, "") if self.mark else block
        try:
            found = tool_format.read(block, self.functions)
            calls = [self._call(name, arguments) for name, arguments in found]
        except (ValueError, RecursionError):
            space, self.space = self.space or "", None
            return [space + block]
        self.space = ""
        return [
            part
            for call in (calls if self.parallel else calls[:1])
            for part in (CallDelta(call.id, call.name, call.arguments, begins=True), call)
        ]

    def _call(self, name: str, arguments: dict[str, Any]) -> ToolCall:
        parameters = self.functions[name]
        if names_none(parameters) and not parameters.get("additionalProperties"):
            arguments = {}  # the model made some up
        # Not every value that Python reads as JSON is JSON, or text.
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()
        return ToolCall(name, text)
