"""Reads descriptions of tools, and calls of them, in the forms that data sets have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...errors import DataError, InvalidArgumentError
from ...files.rows import kind, listed
from ...text.messages import parse_arguments

Tool = dict[str, Any]
"""A function in OpenAI's form: `type` and `function` with `name`, `description`, `parameters`."""


def parse_tools(value: Any, name: str) -> list[Tool]:
    """Parses descriptions in OpenAI's form, or of the functions alone; a list, or its JSON text."""
    places = _places(_objects(value, name), name)
    tools = [_parse_tool(*place) for place in places]
    names = [tool["function"]["name"] for tool in tools]
    if twice := {each for each in names if names.count(each) > 1}:
        raise DataError(
            f"{name}: expected each function once, found {listed(sorted(twice))} twice; remove one"
        )
    return tools


def parse_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Parses calls in OpenAI's form, or of the functions alone; a list, one call, or JSON text."""
    return [_parse_call(*place) for place in _places(_objects(value, name), name)]


def parse_object(value: Any, name: str) -> dict[str, Any]:
    """Parses an object, or its JSON text."""
    value = _from_json(value, name)
    if not isinstance(value, dict):
        raise DataError(f"{name}: expected an object {{…}}, found {kind(value)}; correct it")
    return value


def check_texts(value: Any, name: str) -> None:
    """Raises DataError for text that no tokenizer takes, anywhere in `value`."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{name}: expected valid Unicode, found half a surrogate pair; write both halves or "
            "the character itself"
        ) from None
    except RecursionError:
        raise DataError(
            f"{name}: expected flatter objects, found too many levels; correct it"
        ) from None
    if "\\u0000" in text.replace("\\\\", ""):
        raise DataError(f"{name}: expected text, found a NUL character; remove it")


def _places(items: list[Any], name: str) -> list[tuple[Any, str]]:
    return [(item, f"{name}[{index}]") for index, item in enumerate(items)]


def parse_objects(value: Any, name: str) -> list[dict[str, Any]]:
    """Parses a list of objects, or one; a list and each in it may be JSON text."""
    return [parse_object(*place) for place in _places(_objects(value, name), name)]


def _objects(value: Any, name: str) -> list[Any]:
    value = _from_json(value, name)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"{name}: expected a list of objects, found {kind(value)}; correct it")
    check_texts(value, name)
    return value


def _from_json(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(
            f"{name}: expected objects, or JSON as text, found text that is no JSON; correct it"
        ) from None


def _parse_tool(value: Any, name: str) -> Tool:
    tool = parse_object(value, name)
    if isinstance(tool.get("function"), Mapping):
        _check_type(tool, name)
        function, inner = tool["function"], f"{name}.function"
    else:
        function, inner = tool, name
    _function_name(function, inner)
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise DataError(
            f"{inner}.parameters: expected a JSON schema, found {kind(parameters)}; correct it"
        )
    return tool if function is not tool else {"type": "function", "function": tool}


def _parse_call(value: Any, name: str) -> dict[str, Any]:
    call = parse_object(value, name)
    if "function" in call:
        _check_type(call, name)
        _check_fields(call, ("id", "type", "index", "function"), name)
        function, inner = parse_object(call["function"], f"{name}.function"), f"{name}.function"
        _check_fields(function, ("name", "arguments"), inner)
    else:
        _check_fields(call, ("id", "type", "name", "arguments"), name)
        function, inner = call, name
    field = f"{inner}.arguments"
    try:
        arguments = parse_arguments(function.get("arguments"), field)
    except InvalidArgumentError:
        arguments = None
    if not isinstance(arguments, dict):
        raise DataError(
            f"{field}: expected an object, or its JSON text, found "
            f"{kind(function['arguments'])}; correct it"
        )
    check_texts(arguments, field)
    parsed = {"name": _function_name(function, inner), "arguments": arguments}
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": parsed}


def _check_type(value: Mapping[str, Any], name: str) -> None:
    if value.get("type", "function") not in ("function", None):
        raise DataError(
            f"{name}.type: expected function, found {value['type']!r:.40}; remove such samples"
        )


def _check_fields(value: Mapping[str, Any], fields: tuple[str, ...], name: str) -> None:
    for field in value:
        if field not in fields and value[field] not in (None, ""):
            raise DataError(
                f"{name}.{field}: expected {listed(fields)} alone, found {field}, which is not "
                "read; rename or remove it"
            )


def _function_name(function: Mapping[str, Any], name: str) -> str:
    found = function.get("name")
    if not isinstance(found, str) or not found.strip():
        label = kind(found) if "name" in function else "none"
        raise DataError(f"{name}.name: expected the name of a function, found {label}; add it")
    return found
