"""Messages as chat templates take them: text, and calls of tools with their arguments as objects.

Clients of OpenAI's API keep a call's arguments as JSON text, and templates such as MiniCPM5's read
them as a mapping.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..arguments import shown
from ..errors import InvalidArgumentError, TemplateError


def prepare_messages(messages: object) -> list[dict[str, Any]]:
    """`messages` as dicts for a chat template; TemplateError for what none can render.

    Each needs a `role` and a `content`, both text; a message of `tool_calls` may lack the content.
    Arguments of calls become mappings; all else stays as it is.
    """
    if not isinstance(messages, list | tuple):
        raise TemplateError(f"messages must be a list of dicts, found {_kind(messages)}")
    if not messages:
        raise TemplateError("messages is empty; give at least one message with a role and content")
    return [_prepare(message, f"messages[{index}]") for index, message in enumerate(messages)]


def parse_arguments(arguments: object, field: str) -> Any:
    """The mapping that a call's `arguments` are the JSON text of; what is not text stays.

    InvalidArgumentError that names `field` for text of anything else.
    """
    # A call without arguments comes as any of these, depending on who wrote it.
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        return {}
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise InvalidArgumentError(
            f"must be a JSON object as text, got {shown(arguments)}", field=field
        )
    return parsed


def _prepare(message: object, field: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TemplateError(
            f"{field} must be a dict with a role and content, found {_kind(message)}"
        )
    prepared = dict(message)
    calls = prepared.get("tool_calls")
    if calls and isinstance(calls, list | tuple):
        prepared["tool_calls"] = [
            _prepare_call(call, f"{field}.tool_calls[{index}]") for index, call in enumerate(calls)
        ]
        if prepared.get("content") is None:
            prepared["content"] = ""
    for key in ("role", "content"):
        if not isinstance(prepared.get(key), str):
            found = _kind(prepared[key]) if key in prepared else f"no {key}"
            raise TemplateError(f"{field} must have a text {key}, found {found}")
    return prepared


def _prepare_call(call: Any, field: str) -> Any:
    """A call in OpenAI's form, or its function alone."""
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        return {**call, "function": _prepare_function(call["function"], f"{field}.function")}
    return _prepare_function(call, field)


def _prepare_function(function: Any, field: str) -> Any:
    if not isinstance(function, Mapping) or "arguments" not in function:
        return function
    try:
        arguments = parse_arguments(function["arguments"], f"{field}.arguments")
    except InvalidArgumentError as error:
        raise TemplateError(str(error)) from None
    return {**function, "arguments": arguments}


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
