"""Calls as models write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from minicpm_mlx.text.python_tools import python_call

Calls = Sequence[tuple[str, dict[str, Any]]]


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
