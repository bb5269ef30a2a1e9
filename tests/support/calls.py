"""Functions, and calls of them as models write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import minicpm_mlx as mm
from minicpm_mlx.text.chat_template import CHATML
from minicpm_mlx.text.python_tools import python_call

Calls = Sequence[tuple[str, dict[str, Any]]]


WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "place": {
            "type": "object",
            "properties": {"unit": {"enum": ["C", "F"]}, "exact": {"type": ["boolean", "null"]}},
            "required": ["unit"],
        },
    },
    "required": ["city", "days"],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get-weather", "description": "Forecast.", "parameters": WEATHER},
    },
    {"type": "function", "function": {"name": "now"}},
]
Arguments = dict[str, Any]


PYTHON = """{%- if tools %}<|im_start|>system
{{ tools | tojson }} <|tool_call_start|><|im_end|>
{% endif %}""" + CHATML.replace(
    "message.content", "message.content ~ (message.tool_calls or '') | string"
)
"""As MiniCPM4-MCP's: a place for tools, and calls in Python."""

ROME = ("get-weather", {"city": "Rome", "days": 3, "place": {"unit": "C", "exact": None}})
NOW: tuple[str, Arguments] = ("now", {})
SPECIAL = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
XML_SPECIAL = (*SPECIAL, "<function", "</function>", "<param", "</param>")


def asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def calls_of(reply: mm.Completion) -> list[tuple[str, Arguments]]:
    return [(call.name, json.loads(call.arguments)) for call in reply.tool_calls]


def as_json(calls: Calls) -> str:
    lines = [json.dumps({"name": name, "arguments": given}) for name, given in calls]
    return "\n".join(f"<tool_call>\n{line}\n</tool_call>" for line in lines)


def as_xml(calls: Calls) -> str:
    return "\n".join(
        f'<function name="{name}">'
        + "".join(f'<param name="{key}">{_xml(value)}</param>' for key, value in given.items())
        + "</function>"
        for name, given in calls
    )


def _xml(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"<![CDATA[{text}]]>" if "<" in text or "&" in text or "\n" in text else text


def as_python(calls: Calls) -> str:
    lines = "\n".join(python_call(name, given) for name, given in calls)
    return f"<|tool_call_start|>\n```python\n{lines}\n```\n<|tool_call_end|>"
