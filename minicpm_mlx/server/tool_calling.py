"""Functions that a model may call: what it is told of them, and what it wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from ..engine.grammar import Grammar
from ..lm.outputs import overlap
from ..text.tokenizer import Tokenizer
from .http.api_error import ApiError, unsupported
from .http.streaming import Body, identifier
from .parameters import compute, grammar_of
from .tool_formats import Form, form_of

if TYPE_CHECKING:
    from .service import Service

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]


class Function(Body):
    """A function as OpenAI's chat API describes it."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """The JSON schema of its arguments, an object's."""
    strict: bool | None = None
    """Accepted: calls that are asked for follow the schema in any case."""


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: Name


class NamedChoice(Body):
    """This function, and no other, must be called."""

    type: Literal["function"]
    function: NamedFunction


@dataclass(frozen=True)
class ToolCall:
    """A call that a model wrote."""

    name: str
    arguments: str
    """An object as JSON text."""
    id: str = field(default_factory=lambda: identifier("call_"))


class Toolbox:
    """The functions of one request.

    `choice` is "auto" (the model decides), "none", "required" (at least one call) or the name of
    the function to call. ApiError where there are functions and the model's chat template has no
    place for them, or writes calls in a form that is not known here.
    """

    def __init__(
        self,
        service: Service,
        tools: Sequence[Function],
        choice: str = "auto",
        parallel: bool = True,
    ):
        self.service = service
        self.tokenizer: Tokenizer = service.lm.tokenizer
        self.functions = {tool.name: dict(tool.parameters or {}) for tool in tools}
        self.choice, self.parallel = choice, parallel
        _check(tools, self.functions, choice)
        self.active = bool(tools) and choice != "none"
        self.form: Form | None = self._form() if self.active else None
        described = [tool.model_dump(exclude_none=True, exclude={"strict"}) for tool in tools]
        self.described = [{"type": "function", "function": one} for one in described]

    def _form(self) -> Form:
        template = self.tokenizer.template
        if template is None or not template.takes_tools:
            raise unsupported(
                "tools",
                "this model's chat template has no place for them; leave them out, or serve a "
                "model that was trained with tools",
            )
        form = form_of(template.source)
        if form is None:
            raise unsupported("tools", "this model's chat template has calls in an unknown form")
        return form

    @property
    def for_template(self) -> list[dict[str, Any]] | None:
        """What the chat template is given."""
        return self.described if self.active else None

    @property
    def keep_special(self) -> bool:
        """Whether the marks of a call are special tokens, which text leaves out otherwise."""
        form = self.form
        return form is not None and any(
            mark in form.opening or mark in form.closing for mark in self._specials()
        )

    @property
    def stops(self) -> list[str]:
        """What ends the reply early: the end of the first call, where one is enough."""
        return [self.form.closing] if self.form is not None and not self.parallel else []

    def reader(self) -> CallReader | None:
        """What finds the calls in one reply."""
        return None if self.form is None else CallReader(self.form, self.functions)

    async def grammar(self) -> Grammar | None:
        """What holds the reply to calls, where the client wants one."""
        form = self.form
        if form is None or self.choice == "auto":
            return None
        lark = await compute(lambda: self._lark(form), "tools")
        return await grammar_of(self.service, {"ebnf": lark}, "tools")

    def _lark(self, form: Form) -> str:
        names = [self.choice] if self.choice in self.functions else list(self.functions)
        rules = [form.rule(name, self.functions[name], self._literal) for name in names]
        calls = (
            "call" if self.choice in self.functions or not self.parallel else 'call ("\\n" call)*'
        )
        return "\n".join(
            [
                f"start: {calls}",
                "call: " + " | ".join(f"call{i}" for i in range(len(rules))),
                *(f"call{i}: {rule}" for i, rule in enumerate(rules)),
            ]
        )

    def _literal(self, text: str) -> str:
        """A Lark expression for `text`: special tokens by number, as their text would be others."""
        specials = self._specials()
        pattern = "|".join(re.escape(mark) for mark in sorted(specials, key=len, reverse=True))
        pieces = re.split(f"({pattern})", text) if specials else [text]
        return " ".join(
            f"<[{specials[piece]}]>" if piece in specials else json.dumps(piece, ensure_ascii=False)
            for piece in pieces
            if piece
        )

    def _specials(self) -> dict[str, int]:
        """The special tokens that marks are made of."""
        added = self.tokenizer.backend.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}


def _check(tools: Sequence[Function], functions: Mapping[str, Any], choice: str) -> None:
    if len(functions) != len(tools):
        raise ApiError(400, "tools: each function needs a name of its own", field="tools")
    if choice in ("auto", "none"):
        return
    if not functions:
        raise ApiError(400, f"tool_choice {choice!r} needs tools; give some", field="tool_choice")
    if choice != "required" and choice not in functions:
        raise ApiError(
            400,
            f"tool_choice: expected one of {', '.join(functions)}, got {choice!r}",
            field="tool_choice",
        )


class CallReader:
    """Divides a reply, as it comes, into text and calls; what is no good call stays text."""

    def __init__(self, form: Form, functions: Mapping[str, Any]):
        self.form, self.functions = form, functions
        self.held = ""
        self.called = False
        """A call has been found."""

    def add(self, text: str) -> list[str | ToolCall]:
        """What is certain by now."""
        self.held += text
        found: list[str | ToolCall] = []
        while (at := self.held.find(self.form.opening)) >= 0:
            self._say(found, at)
            end = self.form.end(self.held)
            if end < 0:
                return found
            found.append(self._call(self.held[:end]))
            self.held = self.held[end:]
        self._say(found, len(self.held) - overlap(self.held, self.form.opening))
        return found

    def finish(self, stopped_by: str | None = None) -> list[str | ToolCall]:
        """The rest, once no more text comes; a call may have been cut by the stop string."""
        rest, self.held = self.held, ""
        if rest.startswith(self.form.opening) and stopped_by == self.form.closing:
            return [self._call(rest + self.form.closing)]
        found: list[str | ToolCall] = []
        self.held = rest
        self._say(found, len(rest))
        return found

    def _say(self, found: list[str | ToolCall], length: int) -> None:
        """Give out the first characters as text; space between calls is no text."""
        text, self.held = self.held[:length], self.held[length:]
        if text and not (self.called and text.isspace()):
            found.append(text)

    def _call(self, text: str) -> str | ToolCall:
        try:
            name, arguments = self.form.read(text, self.functions)
        except (ValueError, RecursionError):
            return text
        self.called = True
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
