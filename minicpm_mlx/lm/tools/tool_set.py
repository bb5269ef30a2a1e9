"""The functions of one request: what the prompt says of them, and what the reply is held to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...arguments import shown
from ...engine import Grammar
from ...errors import InvalidArgumentError, TemplateError
from ...text.python_tools import OPENING
from ...text.thinking import ThinkingForm
from ...text.tokenizer import Tokenizer
from ...text.tools import describe_tools
from ..structured.closed_schema import closed
from ..structured.either_grammar import EitherGrammar
from ..structured.grammar import grammar_of
from .calls import CallReader, names_none
from .formats import JsonToolFormat, ToolFormat
from .python_format import PythonToolFormat
from .xml_format import XmlToolFormat

TOOL_FORMATS: Sequence[ToolFormat] = (PythonToolFormat(), JsonToolFormat(), XmlToolFormat())


def detect_tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template uses, found by the text that opens a call."""
    return next((form for form in TOOL_FORMATS if form.opening in template), None)


class ToolSet:
    """The functions that a model may call.

    `tools` are in OpenAI's form, `{"type": "function", "function": {"name": ..., "parameters":
    ...}}`, or the function alone; with `strict` true in one of them, all calls follow their
    schemas. `choice` is "auto" (the model decides), "none", "required" (at least one call) or the
    name of the function to call; without `parallel` there is one call at most. TemplateError if
    the model was not trained with tools, or writes calls in an unknown form; InvalidArgumentError,
    with the field of OpenAI's API, for tools that contradict each other.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tools: Sequence[Mapping[str, Any]] | None = None,
        choice: str = "auto",
        parallel: bool = True,
    ):
        self.tokenizer, self.choice, self.parallel = tokenizer, choice, parallel
        self.described = describe_tools(tools or ())
        functions = [tool["function"] for tool in self.described]
        self.functions = {one["name"]: one["parameters"] for one in functions}
        self._check(len(functions))
        self.is_strict = any(_is_strict(tool) for tool in tools or ())
        self.active = bool(functions) and choice != "none"
        self.format = self._find_format() if self.active else None

    def _check(self, count: int) -> None:
        if len(self.functions) != count:
            raise InvalidArgumentError("must each have a name of their own", field="tools")
        if self.choice in ("auto", "none"):
            return
        if not self.functions:
            raise InvalidArgumentError(
                f"{shown(self.choice)} needs tools; give some", field="tool_choice"
            )
        if self.choice != "required" and self.choice not in self.functions:
            raise InvalidArgumentError(
                f"must be one of {', '.join(self.functions)}, got {shown(self.choice)}",
                field="tool_choice",
            )

    def _find_format(self) -> ToolFormat:
        tokenizer = self.tokenizer
        if tokenizer.calls_in_python:
            return next(form for form in TOOL_FORMATS if form.opening == OPENING)
        template = tokenizer.template
        if template is None or not template.takes_tools:
            raise TemplateError(
                "this model's chat template does not take tools; leave them out, or use a model "
                "that was trained with tools"
            )
        tool_format = detect_tool_format(template.source)
        if tool_format is None:
            raise TemplateError("this model's chat template writes calls in an unknown form")
        return tool_format

    @property
    def for_template(self) -> list[dict[str, Any]] | None:
        """The `tools` of the prompt."""
        return self.described if self.active else None

    @property
    def keep_special(self) -> bool:
        """Whether the tags of a call are special tokens, which text leaves out otherwise."""
        tags = self.format.opening + "\0" + self.format.closing if self.format else ""
        return any(token in tags for token in self.tokenizer.special_tokens)

    @property
    def stops(self) -> list[str]:
        """Stop strings: the end of the first call if no parallel calls are wanted.

        A grammar ends the reply by itself, and lets arguments have the text of the mark.
        """
        stops = self.format is not None and not self.parallel and not self.is_held
        return [self.format.closing] if self.format is not None and stops else []

    @property
    def is_forced(self) -> bool:
        """Whether the reply must be a call."""
        return self.active and self.choice != "auto"

    @property
    def is_held(self) -> bool:
        """Whether a grammar holds all calls to their schemas."""
        return self.is_forced or (self.active and self.is_strict)

    def reader(self, marks: ThinkingForm | None = None, *, streams: bool = False) -> CallReader:
        """Reads one reply; with `marks` its thought stays in the text, between them.

        With `streams` calls come in parts, where a grammar holds them valid.
        """
        return CallReader(
            self.format,
            self.functions,
            marks,
            parallel=self.parallel,
            streams=streams and self.is_held,
        )

    def lark(self, within_text: bool = False) -> str:
        """The grammar, in Lark, of a reply that is calls; or of text in which they may come."""
        form = self.format
        assert form is not None
        only = self.choice in self.functions
        names = [self.choice] if only else list(self.functions)
        literal = self._after_opening if within_text else self.literal
        rules = [
            form.rules(f"call{i}", name, _arguments_schema(self.functions[name]), literal)
            for i, name in enumerate(names)
        ]
        rules.append("call: " + " | ".join(f"call{i}" for i in range(len(names))))
        several = self.parallel and not only
        before, after = literal(form.before) if form.before else "", self.literal(form.after)
        calls = 'call ("\\n" call)*' if several and (form.before or not within_text) else "call"
        calls = f"{before} {calls} {after}"
        rules = [*dict.fromkeys("\n".join(rules).splitlines())]  # calls share terminals
        if not within_text:
            return "\n".join([f"start: {calls}", *rules])
        opening, regex = self.literal(form.opening), re.escape(form.opening)
        if opening == json.dumps(form.opening):
            begin = f"OPENING\nOPENING: /(?s:.*){regex}/", "[lazy]"
        else:  # the mark is told by its token, and no text spells it
            begin = f"TEXT? {opening}", ""
        return "\n".join(
            [
                "start: (begin block)* TEXT?" if several else "start: TEXT? | begin block",
                f"block: {calls}",
                f"begin{begin[1]}: {begin[0]}",
                f"TEXT: /(?s:.*)/ & ~/(?s:.*){regex}(?s:.*)/",
                *rules,
            ]
        )

    def _after_opening(self, text: str) -> str:
        """As `literal`, without the mark that has come already."""
        assert self.format is not None
        return self.literal(text.removeprefix(self.format.opening))

    def literal(self, text: str) -> str:
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


def answer_grammar(tools: ToolSet, grammar: Grammar | None) -> Grammar | None:
    """The grammar of a reply: calls where they must come, else `grammar`, with which calls may
    come in place of the answer that it is for; of strict tools, text in which calls may come."""
    if not tools.active or not (tools.is_held or grammar):
        return grammar
    within_text = not tools.is_forced and grammar is None
    calls = grammar_of(tools.tokenizer, ebnf=tools.lark(within_text))
    return calls if tools.is_forced or grammar is None else EitherGrammar([calls, grammar])


def _is_strict(tool: Mapping[str, Any]) -> bool:
    function = tool.get("function", tool)
    return isinstance(function, Mapping) and function.get("strict") is True


def _arguments_schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a call's arguments: an object with the parameters that are named and no others,
    unless `parameters` allows them."""
    stated = parameters.get("type", "object")
    if "object" not in (stated if isinstance(stated, list) else [stated]):
        raise InvalidArgumentError(
            f"parameters must be the JSON schema of an object, got type {shown(stated)}",
            field="tools",
        )
    schema = {**parameters, "type": "object"}
    return closed(schema | {"properties": {}} if names_none(schema) else schema)
