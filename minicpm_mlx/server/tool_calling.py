"""Functions that a model may call: their description in the prompt, and calls in the reply."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from ..engine import Grammar
from ..lm.structured.closed_schema import closed
from ..text.thinking import ThinkingForm, overlap
from .http.api_error import ApiError, unsupported
from .http.schema import Body
from .http.streaming import new_id
from .parameters import compile_grammar, compile_only_grammar, run_in_thread
from .reply_stream import Chunk
from .service import Service
from .tool_formats import ToolFormat, detect_tool_format

NO_PARAMETERS = {"type": "object", "properties": {}}
"""What the model is told of a function without `parameters`; templates expect both fields."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]


class Function(Body):
    """A function as OpenAI's chat API describes it."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """The JSON schema of its arguments, an object."""
    strict: bool | None = None
    """Accepted: required calls follow the schema in any case."""


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: Name


class NamedChoice(Body):
    """The one function that must be called."""

    type: Literal["function"]
    function: NamedFunction


@dataclass(frozen=True)
class ToolCall:
    """A call that a model wrote."""

    name: str
    arguments: str
    """An object as JSON text."""
    id: str = field(default_factory=lambda: new_id("call_"))


@dataclass(frozen=True)
class Thought:
    """A part of what a model thinks before it answers."""

    text: str


Part = str | Thought | ToolCall
"""Of a reply: text, thought, or a whole call."""


def template_call(call_id: str, name: str, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """A call of an earlier message, as chat templates take it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


class RequestTools:
    """The functions of one request.

    `choice` is "auto" (the model decides), "none", "required" (at least one call) or the name of
    the function to call. Raises ApiError if there are functions and the model's chat template does
    not take them or writes calls in an unknown format.
    """

    def __init__(
        self,
        service: Service,
        tools: Sequence[Function],
        choice: str = "auto",
        parallel: bool = True,
    ):
        self.service = service
        self.tokenizer = service.lm.tokenizer
        self.functions = {tool.name: tool.parameters or NO_PARAMETERS for tool in tools}
        self.choice, self.parallel = choice, parallel
        _check_choice(tools, self.functions, choice)
        self.active = bool(tools) and choice != "none"
        self.format: ToolFormat | None = self._find_format() if self.active else None
        self.described = [
            {
                "type": "function",
                "function": tool.model_dump(exclude_none=True, exclude={"strict"})
                | {"parameters": self.functions[tool.name]},
            }
            for tool in tools
        ]

    def _find_format(self) -> ToolFormat:
        template = self.tokenizer.template
        if template is None or not template.takes_tools:
            raise unsupported(
                "tools",
                "this model's chat template does not take tools; leave them out, or serve a model "
                "that was trained with tools",
            )
        tool_format = detect_tool_format(template.source)
        if tool_format is None:
            raise unsupported("tools", "this model's chat template writes calls in an unknown form")
        return tool_format

    @property
    def for_template(self) -> list[dict[str, Any]] | None:
        """The `tools` argument of the chat template."""
        return self.described if self.active else None

    @property
    def keep_special(self) -> bool:
        """Whether the tags of a call are special tokens, which text leaves out otherwise."""
        tags = self.format.opening + "\0" + self.format.closing if self.format else ""
        return any(token in tags for token in self.tokenizer.special_tokens)

    @property
    def stops(self) -> list[str]:
        """Stop strings: the end of the first call if no parallel calls are wanted."""
        return [self.format.closing] if self.format is not None and not self.parallel else []

    def reader(self, marks: ThinkingForm | None = None) -> CallReader:
        """Reads one reply; with `marks` its thought stays in the text, between them."""
        return CallReader(self.format, self.functions, marks)

    async def grammar(self, guides: Mapping[str, Mapping[str, Any]]) -> Grammar | None:
        """The grammar that `guides` give by field, or that of a required call.

        ApiError if there are several guides, or a guide and tools.
        """
        guides = {name: guide for name, guide in guides.items() if guide}
        tool_format = self.format
        if tool_format is None:
            return await compile_only_grammar(self.service, guides)
        for name in guides:
            raise ApiError(f"{name} and tools exclude each other; leave one out", field=name)
        if self.choice == "auto":
            return None
        lark = await run_in_thread(lambda: self._lark(tool_format), "tools")
        return await compile_grammar(self.service, {"ebnf": lark}, "tools")

    def _lark(self, tool_format: ToolFormat) -> str:
        only = self.choice in self.functions
        names = [self.choice] if only else list(self.functions)
        rules = [
            tool_format.rule(name, _arguments_schema(self.functions[name]), self._literal)
            for name in names
        ]
        return "\n".join(
            [
                "start: call" if only or not self.parallel else 'start: call ("\\n" call)*',
                "call: " + " | ".join(f"call{i}" for i in range(len(rules))),
                *(f"call{i}: {rule}" for i, rule in enumerate(rules)),
            ]
        )

    def _literal(self, text: str) -> str:
        """A Lark expression for `text`. Special tokens are written by id: as text they would be
        spelled with other tokens."""
        special = self.tokenizer.special_tokens
        pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        pieces = re.split(f"({pattern})", text) if special else [text]
        return " ".join(
            f"<[{special[piece]}]>" if piece in special else json.dumps(piece, ensure_ascii=False)
            for piece in pieces
            if piece
        )


def _arguments_schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a call's arguments: an object with the parameters that are named and no others,
    unless `parameters` allows them."""
    schema = {"type": "object", **parameters}
    return closed(schema | {"properties": {}} if _names_none(schema) else schema)


def _names_none(parameters: Mapping[str, Any]) -> bool:
    """Whether the schema of a function's arguments names no parameter."""
    naming = ("properties", "patternProperties", "required", "$ref", "allOf", "anyOf", "oneOf")
    return not any(parameters.get(keyword) for keyword in naming)


def _check_choice(tools: Sequence[Function], functions: Mapping[str, Any], choice: str) -> None:
    if len(functions) != len(tools):
        raise ApiError("tools: each function needs its own name", field="tools")
    if choice in ("auto", "none"):
        return
    if not functions:
        raise ApiError(f"tool_choice {choice!r} needs tools; give some", field="tool_choice")
    if choice != "required" and choice not in functions:
        raise ApiError(
            f"tool_choice: expected one of {', '.join(functions)}, got {choice!r}",
            field="tool_choice",
        )


class CallReader:
    """Splits a reply into its parts as it arrives; an invalid call stays text.

    Without a format all of the answer is text. A thought has no calls.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        functions: Mapping[str, Any],
        marks: ThinkingForm | None = None,
    ):
        self.format, self.functions, self.marks = tool_format, functions, marks
        self.in_thought = False
        self.pending = ""
        self.has_called = False

    def read(self, chunk: Chunk) -> list[Part]:
        """The thought, the text and the calls that are complete with `chunk`."""
        pieces = self._thought(chunk) if chunk.thinking or self.in_thought else []
        pieces += self.add(chunk.text)
        return pieces + self.finish(chunk.stopped_by) if chunk.finish_reason else pieces

    def _thought(self, chunk: Chunk) -> list[Part]:
        if self.marks is None:
            return [Thought(chunk.thinking)]
        opening = "" if self.in_thought else f"{self.marks.opening}\n"
        ends = bool(chunk.text)
        self.in_thought = not ends
        return [opening + chunk.thinking + (f"\n{self.marks.closing}\n\n" if ends else "")]

    def add(self, text: str) -> list[Part]:
        if self.format is None:
            return [text] if text else []
        self.pending += text
        pieces: list[Part] = []
        while (start := self.pending.find(self.format.opening)) >= 0:
            self._take_text(pieces, start)
            end = self.format.end(self.pending)
            if end < 0:
                return pieces
            pieces.append(self._parse_call(self.format, self.pending[:end]))
            self.pending = self.pending[end:]
        self._take_text(pieces, len(self.pending) - overlap(self.pending, self.format.opening))
        return pieces

    def finish(self, stopped_by: str | None = None) -> list[Part]:
        """The rest at the end of the reply; the stop string may have cut the end of a call off."""
        pieces: list[Part] = []
        form = self.format
        if form and self.pending.startswith(form.opening) and stopped_by == form.closing:
            text, self.pending = self.pending, ""
            return [self._parse_call(form, text + form.closing)]
        self._take_text(pieces, len(self.pending))
        return pieces

    def _take_text(self, pieces: list[Part], length: int) -> None:
        """Moves the first characters to `pieces`. White space between calls is left out."""
        text, self.pending = self.pending[:length], self.pending[length:]
        if text and not (self.has_called and text.isspace()):
            pieces.append(text)

    def _parse_call(self, tool_format: ToolFormat, text: str) -> str | ToolCall:
        try:
            name, arguments = tool_format.read(text, self.functions)
        except (ValueError, RecursionError):
            return text
        self.has_called = True
        parameters = self.functions[name]
        if _names_none(parameters) and not parameters.get("additionalProperties"):
            arguments = {}  # the model made some up
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
