"""Chat templates: formats messages as prompt text.

A template is a Jinja program from the checkpoint. It runs in Jinja's sandbox with the names and
settings of transformers, and gives the same bytes as there. The sandbox keeps a template away from
Python and the disk; it does not limit its running time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from ..arguments import shown
from ..errors import TemplateError
from .messages import prepare_messages

MINICPM = (
    "{% for message in messages %}"
    "{% set text = message.content | trim %}"
    "{{ '<用户>' ~ text ~ '<AI>' if message.role == 'user' else text }}"
    "{% endfor %}"
)
"""MiniCPM 1.0, 2B and 1B: markers only around user messages, and no generation prompt."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
"""MiniCPM 2B-128k, 3 and 4."""

BUILTIN = {"minicpm": MINICPM, "chatml": CHATML}
"""The family's own templates by name, for folders without one."""

# Markers that are ordinary text to the tokenizer, so that no end token stops the model there.
_PLAIN_MARKERS = ("<用户>", "<AI>")

_OWN_VARIABLES = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    *("raise_exception", "strftime_now"),
)

_MAX_CHARACTERS = 2**24  # of one prompt: far above any context, far below what hurts


class Template:
    """A chat template; `source` is Jinja. `BUILTIN` has the family's own.

    `others` are more names that it may use, such as `pad_token`. It is compiled when first
    rendered, so a broken template is harmless until a chat needs it.

        >>> Template(MINICPM).render([{"role": "user", "content": "Hello"}])
        '<用户>Hello<AI>'
    """

    def __init__(
        self,
        source: str,
        bos_token: str = "",
        eos_token: str = "",
        others: Mapping[str, str | list[str]] | None = None,
    ) -> None:
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.others = dict(others or {})

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Markers of the template that are not special tokens, and so must end a reply."""
        return tuple(marker for marker in _PLAIN_MARKERS if marker in self.source)

    @property
    def takes_tools(self) -> bool:
        """Whether the template uses `tools`."""
        return "tools" in self.variables

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template uses and does not set."""
        from jinja2 import TemplateError as BrokenTemplate
        from jinja2 import meta

        environment = _environment()
        try:
            return frozenset(meta.find_undeclared_variables(environment.parse(self.source)))
        except (BrokenTemplate, RecursionError):
            return frozenset()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation.

        `messages` are as `prepare_messages` takes them. `tools` are functions in OpenAI's form, for
        a template that `takes_tools`. `variables` are more that it uses, such as
        `enable_thinking`. Raises TemplateError for anything else, and for whatever the template
        raises.
        """
        self._check_variables(variables or {})
        if tools and not self.takes_tools:
            raise TemplateError(
                "the chat template has no place for tools; leave them out, or use a model that "
                "was trained with tools"
            )
        prepared = prepare_messages(messages)
        try:
            texts = self._compiled.generate(
                messages=prepared,
                tools=[dict(tool) for tool in tools] if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.others,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                **(variables or {}),
            )
            return _join(texts)
        except TemplateError:
            raise
        except Exception as error:  # a template is a program: it can raise anything
            raise TemplateError(
                f"the chat template could not render these messages ({_one_line(error)}); "
                "check the messages, or replace the model's chat_template"
            ) from error

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        ours = {*_OWN_VARIABLES, *self.others}
        for name in variables:
            if name in ours or name not in self.variables:
                raise TemplateError(
                    f"the chat template has no variable {shown(name)} to set; leave it out"
                )

    @cached_property
    def _compiled(self) -> Any:
        return _environment().from_string(self.source)


def _environment() -> Any:
    """The Jinja environment of transformers' chat templates, with arithmetic kept small."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        # `'a' * 10**12` would take all memory, and `9**9**9` all day.
        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" or _size(left) * _size(right) > _MAX_CHARACTERS:
                raise SecurityError(f"{operator} could make something too large")
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """`{% generation %}` marks replies for training; to a prompt it means nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            scope = nodes.Scope(lineno=next(parser.stream).lineno)
            scope.body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return scope

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _size(factor: Any) -> float:
    return abs(factor) if isinstance(factor, int | float) else len(factor)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(f"the chat template refuses these messages: {_one_line(message)}")


def _join(texts: Any) -> str:
    """The rendered text; TemplateError as soon as it grows too long."""
    rendered: list[str] = []
    length = 0
    for text in texts:
        rendered.append(text)
        length += len(text)
        if length > _MAX_CHARACTERS:
            raise TemplateError(
                f"the chat template's output passes {_MAX_CHARACTERS} characters; "
                "send shorter messages, or replace the model's chat_template"
            )
    return "".join(rendered)


def _one_line(error: object) -> str:
    text = " ".join(str(error).encode(errors="replace").decode().split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"
