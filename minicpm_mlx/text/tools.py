"""Functions as a prompt tells of them, whatever they were written with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..arguments import shown
from ..errors import InvalidArgumentError

NO_PARAMETERS = {"type": "object", "properties": {}}
"""What the model is told of a function without `parameters`; templates expect both fields."""


def describe_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tools in OpenAI's form, with `name`, `description` and `parameters` alone, in this order.

    Each is in that form or the function alone. `strict` is left out: it is no concern of
    the model's. InvalidArgumentError, field "tools", for anything else.
    """
    functions = [_function(tool) for tool in tools]
    return [
        {
            "type": "function",
            "function": one | {"parameters": one.get("parameters") or NO_PARAMETERS},
        }
        for one in functions
    ]


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise InvalidArgumentError(
            f"expected functions with a name, description and parameters, got {shown(tool)}",
            field="tools",
        )
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InvalidArgumentError(
            f"parameters of {shown(name)}: expected a JSON schema, got {shown(parameters)}",
            field="tools",
        )
    kept = ("name", "description", "parameters")
    return {key: function[key] for key in kept if function.get(key) is not None}
