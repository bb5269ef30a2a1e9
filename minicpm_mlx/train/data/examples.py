"""Rows as they are read: conversations, texts, preferences and judged replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .messages import Message


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """The tools and variables that a chat template takes beside the messages."""

    tools: Sequence[Mapping[str, Any]] = ()
    """The functions that the model may call, in OpenAI's form."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """More that the template uses, such as `enable_thinking`."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation whose assistant messages are learned."""

    messages: list[Message]
    """User and assistant alternate and the assistant is last; a system message may come first, and
    results of tools follow the message that calls them."""
    unlearned: frozenset[int] = frozenset()
    """Indices of assistant messages that are not learned."""
    options: TemplateOptions = TemplateOptions()


@dataclass(frozen=True, slots=True)
class Document:
    """A text that is learned whole."""

    text: str


@dataclass(frozen=True, slots=True)
class Preference:
    """Two replies to one prompt, the first preferred."""

    prompt: list[Message]
    """All messages before the reply; the user's, or the result of a tool, is last."""
    chosen: Message
    rejected: Message
    options: TemplateOptions = TemplateOptions()


@dataclass(frozen=True, slots=True)
class Judged:
    """A conversation whose last reply is good or bad."""

    messages: list[Message]
    good: bool
    options: TemplateOptions = TemplateOptions()


@dataclass(frozen=True, slots=True)
class ReplyPrompt:
    """The messages before a reply."""

    messages: list[Message]
    options: TemplateOptions = TemplateOptions()


Example = Conversation | Document | Preference | Judged
