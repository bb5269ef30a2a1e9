"""Tools as Python: how MiniCPM3, 4 and 4.1 are told of functions, and how they call them.

Checkpoints of these have chat templates without a place for tools. The functions then stand in the
system message, and earlier calls in the text of replies, as the models were trained on them.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import TemplateError
from .parameters import list_of, parameters_of, properties_of, target

OPENING, CLOSING = "<|tool_call_start|>", "<|tool_call_end|>"
TOKEN = "<|tool_call|>"
"""A special token that the tokenizers of models trained on such calls have, and only these."""

_DEEP = 8
"""Most types in each other that are spelled out."""
_MOST = 1000
"""Most types that are spelled out of one function's parameters: references multiply them."""
_TYPES = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}

_INTRODUCTION = """# Functions
You can call these Python functions:
```python
from typing import Any, Literal

{functions}
```

# How to call them
- If no function is needed, answer directly.
- If a value that a function needs is missing, ask for it.
- Otherwise write the calls, one a line, with named arguments that are literals:
{opening}
```python
function_name(first_argument="value", second_argument=2)
```
{closing}
Leave out arguments that have a default, unless the user wants another value."""


def python_name(name: str) -> str:
    """The name of a function or argument, as Python takes it: `read-file` is `read_file`."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", name) or "_"
    return f"_{name}" if name[0].isdigit() else f"{name}_" if keyword.iskeyword(name) else name


def python_value(value: Any) -> str:
    """A value of JSON as a literal of Python."""
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, Mapping):
        items = (f"{python_value(str(key))}: {python_value(one)}" for key, one in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(python_value, value))}]"
    return json.dumps(value, ensure_ascii=False)


def python_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call: `f(a="x", b=2)`."""
    named = (f"{python_name(key)}={python_value(value)}" for key, value in arguments.items())
    return f"{python_name(name)}({', '.join(named)})"


def python_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """The part of a system message on functions; TemplateError if two have one name in Python."""
    functions = [tool.get("function", tool) for tool in tools]
    names = [python_name(str(function.get("name"))) for function in functions]
    if len({*names}) < len(names):
        raise TemplateError(
            f"functions must have different names in Python, found {', '.join(names)}; rename some"
        )
    return _INTRODUCTION.format(
        functions="\n\n".join(_function(function) for function in functions),
        opening=OPENING,
        closing=CLOSING,
    )


def with_python_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """`messages` for a template without a place for tools: functions in the system message, and
    calls in the text of replies.

    TemplateError for values that are nested too deeply, or as `python_tools` raises it.
    """
    try:
        return _with_python_tools(messages, tools)
    except RecursionError:
        raise TemplateError(
            "tools, or arguments of calls, are nested too deeply; send flatter ones"
        ) from None


def _with_python_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    written = [_with_calls(message) for message in messages]
    if not tools:
        return written
    system = written.pop(0)["content"] if written and written[0]["role"] == "system" else ""
    parts = [part for part in (system, python_tools(tools)) if part.strip()]
    return [{"role": "system", "content": "\n\n".join(parts)}, *written]


def _with_calls(message: Mapping[str, Any]) -> dict[str, Any]:
    plain = dict(message)
    calls = plain.pop("tool_calls", None)
    if not calls:
        return plain
    functions = [call.get("function", call) for call in calls]
    lines = [
        python_call(str(function["name"]), function.get("arguments") or {})
        for function in functions
    ]
    block = "\n".join([OPENING, "```python", *lines, "```", CLOSING])
    text = plain["content"]
    return plain | {"content": f"{block}\n{text}" if text.strip() else block}


def _function(function: Mapping[str, Any]) -> str:
    """A function as Python declares it."""
    schema = function.get("parameters")
    schema = schema if isinstance(schema, Mapping) else {}
    whole = parameters_of(schema)
    properties, required = properties_of(whole), list_of(whole, "required")
    # Python wants parameters with a default behind the others.
    names = sorted(properties, key=lambda name: name not in required)
    types = _Types(schema)
    stated = ", ".join(
        f"{python_name(str(name))}: {types.type(properties[name])}"
        + ("" if name in required else f" = {_default(properties[name])}")
        for name in names
    )
    lines = [str(function.get("description") or "").strip()]
    notes = [note for name in names for note in _described(python_name(name), properties[name])]
    if notes:
        lines += ["", "Args:", *(f"    {note}" for note in notes)]
    body = [line for text in lines for line in text.split("\n")]
    inner = "\n".join(f"    {line}" if line else "" for line in body).strip()
    end = "\n    " if "\n" in inner else ""
    doc = f'\n    """{inner}{end}"""' if inner else "\n    ..."
    return f"def {python_name(str(function.get('name')))}({stated}):{doc}"


def _default(schema: Any) -> str:
    default = schema.get("default") if isinstance(schema, Mapping) else None
    return python_value(default)


def _described(name: str, schema: Any, depth: int = 0) -> Iterator[str]:
    """A line for a parameter, and one for each field inside it, that is described."""
    if not isinstance(schema, Mapping) or depth > _DEEP:
        return
    if text := str(schema.get("description") or "").strip():
        yield f"{name}: {' '.join(text.split())}"
    inner = schema.get("properties")
    for key, field in inner.items() if isinstance(inner, Mapping) else ():
        yield from _described(f"{name}[{python_value(str(key))}]", field, depth + 1)
    yield from _described(f"{name}[i]", schema.get("items"), depth + 1)


class _Types:
    """The types of a function's parameters, as Python writes them."""

    def __init__(self, root: Mapping[str, Any]):
        self.root, self.left = root, _MOST

    def type(self, schema: Any, depth: int = 0) -> str:
        """The type of a value."""
        if not isinstance(schema, Mapping) or depth > _DEEP or not self.left:
            return "Any"
        self.left -= 1
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(values, list) and values:
            return f"Literal[{', '.join(map(python_value, values))}]"
        if isinstance(reference := schema.get("$ref"), str):
            return self.type(target(self.root, reference), depth + 1)
        for key in ("anyOf", "oneOf", "allOf"):
            if isinstance(schema.get(key), list) and schema[key]:
                return _union(self.type(inner, depth + 1) for inner in schema[key])
        kind = schema.get("type")
        if isinstance(kind, list):
            return _union(self.type({**schema, "type": one}, depth + 1) for one in kind)
        if kind == "array":
            return f"list[{self.type(schema.get('items'), depth + 1)}]"
        if kind == "object" or isinstance(schema.get("properties"), Mapping):
            return self._object(schema, depth)
        return _TYPES.get(kind, "Any") if isinstance(kind, str) else "Any"

    def _object(self, schema: Mapping[str, Any], depth: int) -> str:
        """An object with its fields, as a dict literal of types."""
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            return "dict[str, Any]"
        fields = (
            f"{python_value(str(key))}: {self.type(field, depth + 1)}"
            for key, field in properties.items()
        )
        return f"{{{', '.join(fields)}}}"


def _union(types: Iterator[str]) -> str:
    return " | ".join(dict.fromkeys(types))
