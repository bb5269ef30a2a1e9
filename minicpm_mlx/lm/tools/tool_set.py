"""The functions of one request: what the prompt says of them, and what the reply is held to."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ...arguments import shown
from ...engine import Grammar
from ...errors import InvalidArgumentError, MissingPackageError, TemplateError
from ...text.python_tools import OPENING
from ...text.thinking import ThinkingForm
from ...text.tokenizer import Tokenizer
from ...text.tools import describe_tools
from ..structured.closed_schema import closed
from ..structured.either_grammar import EitherGrammar
from ..structured.grammar import grammar_of, vocabulary_of
from .calls import MARK, CallReader, names_none
from .formats import JsonToolFormat, ToolFormat
from .held_calls import HeldCalls
from .python_format import PythonToolFormat
from .xml_format import XmlToolFormat

TOOL_FORMATS: Sequence[ToolFormat] = (PythonToolFormat(), JsonToolFormat(), XmlToolFormat())


def detect_tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template uses, found by the text that opens a call."""
    return next((form for form in TOOL_FORMATS if form.opening in template), None)


class ToolSet:
    """The functions that a model may call.

    `tools` are in OpenAI's form, `{"type": "function", "function": {"name": ..., "parameters":
    ...}}`, or the function alone. All calls follow their schemas where a special token opens them
    and the grammar takes the schemas; with `strict` true in one of them, always. `choice` is "auto"
    (the model decides), "none", "required" (at least one call) or the name of the function to call;
    without `parallel` there is one call at most. TemplateError if the model was not trained with
    tools, or writes calls in an unknown form; InvalidArgumentError, with the field of OpenAI's API,
    for tools that contradict each other.
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
        self.is_held = self.is_forced or (self.active and self.is_strict)
        """Whether a grammar holds all calls to their schemas; `answer_grammar` finds out whether
        one can where none must."""

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

    @cached_property
    def call_token(self) -> int | None:
        """The special token that opens calls; None where ordinary text does."""
        return self.tokenizer.special_tokens.get(self.format.opening) if self.format else None

    @property
    def token_marks(self) -> dict[int, str]:
        """Put in front of the text of tokens, for the reader of calls."""
        return {} if self.call_token is None else {self.call_token: MARK}

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
            by_token=self.call_token is not None,
        )

    def lark(self, within_text: bool = False) -> str:
        """The grammar, in Lark, of a reply that is calls; or of text in which they may come, or
        where a token opens these, of what comes after it."""
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
        if not within_text or self.call_token is not None:
            return "\n".join([f"start: {calls}", *rules])
        regex = re.escape(form.opening)
        return "\n".join(
            [
                "start: (begin block)* TEXT?" if several else "start: TEXT? | begin block",
                f"block: {calls}",
                "begin[lazy]: OPENING",
                f"OPENING: /(?s:.*){regex}/",
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
    come in place of the answer that it is for; else text in which calls are held, where they must
    be or can be (`tools.is_held`)."""
    if not tools.active:
        return grammar
    if tools.is_forced or grammar:
        calls = _calls(tools)
        tools.is_held = tools.is_held or tools.call_token is not None
        return calls if tools.is_forced or not grammar else EitherGrammar([calls, grammar])
    if tools.call_token is None:
        if not tools.is_strict:
            return None
        return _calls(tools, within_text=True)
    try:
        held = _held_calls(tools, tools.call_token)
    except (InvalidArgumentError, MissingPackageError):
        if tools.is_strict:
            raise
        return None
    tools.is_held = True
    return held


def _calls(tools: ToolSet, within_text: bool = False) -> Grammar:
    """The grammar of `tools.lark`, which the same functions take from those that are kept."""
    assert tools.format
    continues = within_text and tools.call_token is not None
    about = [tools.format.opening, tools.choice, tools.parallel, within_text, tools.functions]
    return vocabulary_of(tools.tokenizer).guide(
        json.dumps(about, default=repr),
        lambda: grammar_of(tools.tokenizer, ebnf=tools.lark(within_text), continues=continues),
    )


def _held_calls(tools: ToolSet, opening: int) -> HeldCalls:
    assert tools.format
    block = _calls(tools, within_text=True)
    vocabulary = vocabulary_of(tools.tokenizer)
    return HeldCalls(
        opening,
        block,
        every=vocabulary.every,
        ends=vocabulary.ends,
        apart=vocabulary.solid if tools.format.begins_tag else None,
        several=tools.parallel,
    )


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
