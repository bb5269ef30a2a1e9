"""Calls in Python: read as literals, whatever the text; nothing in it is evaluated."""

from __future__ import annotations

import builtins
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_mlx.errors import InvalidArgumentError, TemplateError
from minicpm_mlx.lm.tools.calls import CallDelta, CallReader, ToolCall
from minicpm_mlx.lm.tools.python_format import PythonToolFormat
from minicpm_mlx.lm.tools.python_grammar import PythonGrammar
from minicpm_mlx.lm.tools.python_literals import DEEP, LENGTH, TOKENS, read_calls
from minicpm_mlx.text.python_tools import (
    CLOSING,
    OPENING,
    python_call,
    python_name,
    python_tools,
    with_python_tools,
)

FUNCTIONS: dict[str, Any] = {
    "f": {"type": "object", "properties": {"a": {}, "b": {}, "from": {}}},
    "read-file": {"type": "object", "properties": {"path": {"type": "string"}}},
}


def block(source: str) -> str:
    return f"{OPENING}\n```python\n{source}\n```\n{CLOSING}"


def read(text: str) -> list[Any]:
    """Names and arguments of the calls in a reply, and its text."""
    reader = CallReader(PythonToolFormat(), FUNCTIONS)
    parts = [*reader.add(text), *reader.finish()]
    return [
        (part.name, json.loads(part.arguments)) if isinstance(part, ToolCall) else part
        for part in parts
        if not isinstance(part, CallDelta)
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(calls=st.lists(st.dictionaries(st.sampled_from(["a", "b", "from"]), JSON), min_size=1))
def test_calls_are_read_as_they_are_written(calls: list[dict[str, Any]]) -> None:
    lines = [python_call("f", arguments) for arguments in calls]
    assert read(block("\n".join(lines))) == [("f", arguments) for arguments in calls]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("f(a='x', b=-2)", {"a": "x", "b": -2}),
        ('f(\n    a="""two\nlines""",  # a note\n    b=(1, [True, None]),\n)',
         {"a": "two\nlines", "b": [1, [True, None]]}),
        ("f('x', 2)", {"a": "x", "b": 2}),
        ("f('x', b={'k': 1e3})", {"a": "x", "b": {"k": 1000.0}}),
        ("f(from_=1)", {"from": 1}),
        (r'f(a="\ud83d\ude00 \/ \d \u00e9", b=r"\d")', {"a": "😀 / \\d é", "b": "\\d"}),
        ('f(a="in " "parts", b=0x10)', {"a": "in parts", "b": 16}),
        (f'f(a="{CLOSING}")', {"a": CLOSING}),
        ('f(a="```", b="f(a=1)")', {"a": "```", "b": "f(a=1)"}),
        (r'f(a="\x00")', {"a": "\0"}),
    ],
)  # fmt: skip
def test_literals_of_python_become_json(source: str, expected: dict[str, Any]) -> None:
    assert read(block(source)) == [("f", expected)]
    assert read(f"{OPENING}{source}{CLOSING}") == [("f", expected)]


def test_names_that_python_does_not_take_are_written_otherwise() -> None:
    assert [python_name(name) for name in ("read-file", "class", "2d", "a.b", "é")] == [
        "read_file", "class_", "_2d", "a_b", "_",
    ]  # fmt: skip
    assert read(block('read_file(path="x")')) == [("read-file", {"path": "x"})]


HOSTILE = [
    "f(a=__import__('os').system('touch /tmp/pwned'))",
    "__import__('os')",
    "f(a=g())",
    "f(a=f(a=1))",
    "f(a=os)",
    "f(a=os.environ)",
    "os.f(a=1)",
    "f.f(a=1)",
    "f(a=1)(b=2)",
    "f" + "()" * 100_000,
    "f(a=f'{__import__(1)}')",
    "f(a=f'{" + "[" * 100_000 + "}')",
    "f(a=rb'x')",
    "f(a=[x for x in range(9)])",
    "f(a=(lambda: 1)())",
    "f(a=(b := 1))",
    "f(a=1 if True else 2)",
    "f(a='x' * 10 ** 10)",
    "f(a=9 ** 9 ** 9)",
    "f(a=1 + 1)",
    "f(a=" + "1+" * 100_000 + "1)",
    "f(a=" + "-" * 100_000 + "1)",
    "f(a=" + "- " * 100_000 + "1)",
    "f(a=" + "not " * 100_000 + "1)",
    "f(a=" + "[" * 100_000 + "]" * 100_000 + ")",
    "f(a=" + "(" * 100_000,
    "f(a=" + "{1:" * 1000 + "1" + "}" * 1000 + ")",
    "f(a=" + "x" + "[0]" * 100_000 + ")",
    "f(a=" + "1," * 100_000 + ")",
    "f(a=" + "9" * 5000 + ")",
    "f(a=0x" + "f" * 100_000 + ")",
    "f(a=1e999)",
    "f(a=-1e999)",
    "f(a=1j)",
    "f(a=b'x')",
    "f(a=...)",
    "f(a={1, 2})",
    "f(a={1: 2})",
    "f(a={**{}})",
    "f(*[1])",
    "f(**{'a': 1})",
    "f(a=1, a=2)",
    "f(1, a=2)",
    "f(1, 2, 3, 4)",
    r"f(a='\ud800')",
    "f(a='\ud800')",
    "f(a='\0')",
    "f(a=\0)",
    r"f(a='\N{NO SUCH NAME}')",
    r"f(a='\x0')",
    "f(a=-'x')",
    "f(a=-True)",
    "f(a=True.x)",
    "x = f(a=1)",
    "import os",
    "def f(a): pass",
    "del f",
    "assert f(a=1)",
    "await f(a=1)",
    "@f\nclass x: pass",
    "f(a=1) or f(a=2)",
    "[f(a=1)]",
    "f",
    "'f'",
    "",
    "other(a=1)",
    "print(1)",
    "f(a=1) f(a=2)",
    "f(a=1\n",
    "f(a='x\n')",
    "\ufeff\u202ef(a=1",
    "𝖋(a=eval)",
    "f(a='" + "x" * 10_000_000 + "')",
    "f(a=1)\n" * 10_000,
    "#" * 2_000_000,
    "'" * 300_001,
    '"""' * 100_001,
]


@pytest.mark.parametrize("source", HOSTILE, ids=lambda source: repr(source)[:40])
def test_hostile_calls_stay_text_and_nothing_is_evaluated(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("eval", "exec"):
        monkeypatch.setattr(builtins, name, pytest.fail)
    text = block(source)
    assert "".join(read(text)) == text


def test_the_limits_are_those_of_what_is_read() -> None:
    deepest = "[" * (DEEP - 1) + "]" * (DEEP - 1)
    assert len(read_calls(f"f(a={deepest})")) == 1
    with pytest.raises(ValueError, match="brackets"):
        read_calls(f"f(a=[{deepest}])")
    assert len(read_calls("f();" * (TOKENS // 4))) == TOKENS // 4
    text = "x" * (LENGTH - 8)
    assert read_calls(f"f(a='{text}')")[0].named == {"a": text}


@given(st.text(alphabet="f(a='\"b\\=),[]{}:1-.e\n #`|x", max_size=60))
@settings(max_examples=500)
def test_any_text_is_calls_or_text(source: str) -> None:
    text = block(source)
    parts = read(text)
    assert parts == [text] or all(isinstance(part, tuple) for part in parts)


def test_functions_that_python_could_not_tell_apart_are_refused() -> None:
    with pytest.raises(Exception, match="different names"):
        python_tools([{"name": "a-b"}, {"name": "a_b"}])


def test_descriptions_of_odd_schemas_are_written() -> None:
    for odd in (None, True, 5, "x", [], [1], {"a": None}, {"type": 5}, {"enum": 5}, {"$ref": "#"}):
        for schema in (odd, {"properties": odd}, {"properties": {"p": odd}}, {"required": odd}):
            assert "def f(" in python_tools([{"name": "f", "parameters": schema}])


def test_descriptions_stay_short_whatever_refers_to_what() -> None:
    fields = {"properties": {f"p{i}": {"$ref": "#/$defs/f"} for i in range(40)}}
    either = {"anyOf": [{"$ref": "#/$defs/e"}] * 40}
    named = {"a": {"$ref": "#/$defs/f"}, "b": {"$ref": "#/$defs/e"}}
    parameters = {"properties": named, "$defs": {"f": fields, "e": either}}
    assert len(python_tools([{"name": "f", "parameters": parameters}])) < 100_000


def test_values_that_are_too_deep_are_refused() -> None:
    deep: Any = []
    for _ in range(600):
        deep = [deep]
    tool = {"name": "f", "parameters": {"properties": {"a": {"default": deep}}}}
    with pytest.raises(TemplateError, match="too deeply"):
        with_python_tools([], [tool])
    calls = [{"name": "f", "arguments": {"a": deep}}]
    with pytest.raises(TemplateError, match="too deeply"):
        with_python_tools([{"role": "assistant", "content": "", "tool_calls": calls}], None)


@pytest.mark.parametrize(
    "schema",
    [
        {"patternProperties": {"x": {}}},
        {"allOf": [{"type": "string"}, {"minLength": 2}]},
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        {"$ref": "#/none"},
        {"enum": []},
        {"type": "text"},
    ],
    ids=str,
)
def test_a_schema_that_the_grammar_would_not_hold_to_is_refused(schema: dict[str, Any]) -> None:
    whole = {"type": "object", "properties": {"p": schema}}
    with pytest.raises(InvalidArgumentError):
        PythonGrammar("call", whole, json.dumps).rules("f")
