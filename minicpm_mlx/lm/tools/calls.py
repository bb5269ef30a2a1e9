"""Reads a reply's parts as they come: thought, text, and calls of functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import uuid4

from ...text.thinking import ThinkingForm, overlap
from .formats import ToolFormat


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


Part = str | Thought | ToolCall
"""Of a reply: text, thought, or a whole call."""


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
    the first alone counts where `parallel` is False.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        functions: Mapping[str, Any],
        marks: ThinkingForm | None = None,
        *,
        parallel: bool = True,
    ):
        self.format, self.functions, self.marks = tool_format, functions, marks
        self.parallel = parallel
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
        self.pending += text
        pieces: list[Part] = []
        if self.pending.startswith(self.format.opening) and self.format.closing[-1] not in text:
            return pieces  # still within a block: looking for its end takes time
        while (start := self.pending.find(self.format.opening)) >= 0:
            self._take_text(pieces, start)
            end = self.format.end(self.pending)
            if end < 0:
                return pieces
            pieces += self._parse(self.format, self.pending[:end])
            self.pending = self.pending[end:]
        self._take_text(pieces, len(self.pending) - overlap(self.pending, self.format.opening))
        return pieces

    def finish(self, stopped_by: str | None = None) -> list[Part]:
        """The rest at the end of the reply; the stop string may have cut the end of a call off."""
        pieces: list[Part] = []
        form = self.format
        if form and self.pending.startswith(form.opening) and stopped_by == form.closing:
            text, self.pending = self.pending, ""
            return [*self._parse(form, text + form.closing)]
        self._take_text(pieces, len(self.pending))
        return pieces

    def _take_text(self, pieces: list[Part], length: int) -> None:
        """Moves the first characters to `pieces`. White space alone after a call is left out."""
        text, self.pending = (self.space or "") + self.pending[:length], self.pending[length:]
        if self.space is not None and not text.strip():
            self.space = text
        elif text:
            pieces.append(text)
            self.space = None

    def _parse(self, tool_format: ToolFormat, block: str) -> list[Part]:
        """The calls of a block, or its text."""
        try:
            found = tool_format.read(block, self.functions)
            calls: list[Part] = [self._call(name, arguments) for name, arguments in found]
        except (ValueError, RecursionError):
            space, self.space = self.space or "", None
            return [space + block]
        self.space = ""
        return calls if self.parallel else calls[:1]

    def _call(self, name: str, arguments: dict[str, Any]) -> ToolCall:
        parameters = self.functions[name]
        if names_none(parameters) and not parameters.get("additionalProperties"):
            arguments = {}  # the model made some up
        # Not every value that Python reads as JSON is JSON, or text.
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()
        return ToolCall(name, text)
