"""The prompt of a conversation: its token ids, and how the reply to it is to be read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..arguments import shown
from ..errors import InvalidArgumentError
from .message_text import PromptText
from .thinking import THOUGHTS_OF_CALLS, ThinkingForm
from .tokenizer import Tokenizer
from .tools import describe_tools

_SWITCH = "enable_thinking"
_NOTHING = PromptText("")


@dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """A conversation as a model reads it."""

    ids: list[int]
    text: PromptText = _NOTHING
    """What the chat template rendered."""
    stops: tuple[str, ...] = ()
    """The chat template's own stop strings."""
    thinking: ThinkingForm | None = None
    """How thoughts are marked in the reply; None: the model writes none."""
    in_thought: bool = False
    """Whether the reply begins within a thought."""
    may_think: bool = True
    """False where the prompt closes the thought before the reply."""


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    think: bool | None = None,
    continues: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> ChatPrompt:
    """The prompt of `messages` by the model's chat template.

    `think` switches thinking on or off; None leaves it to the template. With `continues` the last
    message is the beginning of the reply, its thought before it unless thinking is off.
    `variables` are more that the template uses. The prompt tells of `tools` as `describe_tools` has
    them. InvalidArgumentError where the model cannot think, or for what is no tool; else raises as
    `Tokenizer.render` does.
    """
    form, values = tokenizer.thinking, dict(variables or {})
    think = _switch(think, values)
    if think and form is None:
        raise InvalidArgumentError(
            "this model does not think before it answers; leave it out", field="think"
        )
    if think is not None and form and form.has_switch:
        values[_SWITCH] = think
    start, thought = PromptText(""), PromptText("")
    if continues:
        *messages, last = messages
        start = tokenizer.typed(last["content"])
        if form and think is not False:
            thought = tokenizer.typed(str(last.get("reasoning_content") or "").strip())
    tools = describe_tools(tools) if tools else None
    prompt = tokenizer.render(messages, tools=tools, variables=values)
    if think is not None and form and not form.has_switch:
        prompt += PromptText(
            f"{form.opening}\n" if think else f"{form.opening}\n\n{form.closing}\n\n"
        )
    if form and (start.text or thought.text):
        is_open = form.is_open(tokenizer.encode(prompt), prompt.text)
        if is_open or thought.text:
            opening = PromptText("" if is_open else f"{form.opening}\n")
            start = opening + thought + PromptText(f"\n{form.closing}\n\n") + start
    if form is None and tools and tokenizer.calls_in_python:
        form = THOUGHTS_OF_CALLS
    ids = tokenizer.encode(prompt + start)
    return ChatPrompt(
        ids=ids,
        text=prompt + start,
        stops=tokenizer.template.stop_strings if tokenizer.template else (),
        thinking=form,
        in_thought=form is not None and form.is_open(ids, prompt.text) and not start.text,
        may_think=think is not False and not start.text,
    )


def _switch(think: bool | None, variables: dict[str, Any]) -> bool | None:
    """`think`, or the template's own name for it among `variables`, from which it is taken."""
    if _SWITCH not in variables:
        return think
    named = variables.pop(_SWITCH)
    if not isinstance(named, bool):
        raise InvalidArgumentError(f"must be true or false, got {shown(named)}", field=_SWITCH)
    if think not in (None, named):
        raise InvalidArgumentError(
            f"is {named}, and thinking is asked for as {think}; give one", field=_SWITCH
        )
    return named
