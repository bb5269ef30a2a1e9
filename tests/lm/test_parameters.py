"""Parameters that a schema states behind a reference or in parts are told, held to and read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.lm.structured.grammar import grammar_of
from minicpm_mlx.lm.tools.calls import MARK, ToolCall
from minicpm_mlx.lm.tools.tool_set import ToolSet
from minicpm_mlx.text.chat_template import CHATML
from minicpm_mlx.text.parameters import alternatives, parameters_of
from minicpm_mlx.text.python_tools import python_tools
from support.apis import TOOL_TEMPLATE
from support.calls import as_json, as_python, as_xml
from support.scripted_model import SPECIAL, TEMPLATE, scripted_lm

COUNT, UNIT = {"type": "integer"}, {"enum": ["C", "F"]}
A: dict[str, Any] = {"type": "object", "properties": {"a": COUNT}, "required": ["a"]}
S: dict[str, Any] = {"properties": {"s": UNIT}, "required": ["s"]}
DEFS = {"$defs": {"a": A, "s": S}}
BEHIND = {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/s"}], **DEFS}
FORMS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "json": (TOOL_TEMPLATE, as_json),
    "xml": (TEMPLATE, as_xml),
    "python": (CHATML, as_python),
}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (A, [({"a": COUNT}, ["a"])]),
        ({"$ref": "#/$defs/a", **DEFS}, [({"a": COUNT}, ["a"])]),
        (BEHIND, [({"a": COUNT, "s": UNIT}, ["a", "s"])]),
        ({"anyOf": [A, S, {"type": "null"}]}, [({"a": COUNT}, ["a"]), ({"s": UNIT}, ["s"])]),
        (
            {"properties": {"a": COUNT, "s": UNIT}, "anyOf": [{"required": [x]} for x in "as"]},
            [({"a": COUNT, "s": UNIT}, ["a"]), ({"a": COUNT, "s": UNIT}, ["s"])],
        ),
        ({**A, "allOf": [{"properties": {"a": UNIT}}]}, [({"a": {"allOf": [COUNT, UNIT]}}, ["a"])]),
        ({**A, "additionalProperties": False, "allOf": [S]}, []),
        ({**A, "required": ["a", "z"], "additionalProperties": UNIT},
         [({"a": COUNT, "z": UNIT}, ["a", "z"])]),
        ({"properties": {"a": True, "b": False}}, [({"a": {}}, [])]),
        ({"type": "object", "required": ["z", 5]}, [({"z": {}}, ["z"])]),
    ],
)  # fmt: skip
def test_the_parts_of_a_schema_are_put_together(
    schema: dict[str, Any], expected: list[tuple[dict[str, Any], list[str]]]
) -> None:
    if not expected:
        with pytest.raises(InvalidArgumentError, match="no arguments fit"):
            alternatives(schema)
        return
    assert [(one["properties"], one["required"]) for one in alternatives(schema)] == expected


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$ref": "#/$defs/none"},
        {"oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"anyOf": [{"$ref": "#/$defs/a"}] * 40, "$defs": {"a": {"anyOf": [A] * 40}}},
        {"anyOf": [{"$ref": "#/$defs/a"}] * 40, "$defs": {"a": {"anyOf": [{"type": "null"}] * 40}}},
        {**A, "patternProperties": {"^a": UNIT}},
        {**A, "minProperties": 2},
        {"enum": [{"a": 1}]},
        {"type": "string"},
    ],
    ids=str,
)
def test_what_names_alone_do_not_hold_is_refused_and_told_as_it_is(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        alternatives(schema)
    assert "def f(" in python_tools([{"name": "f", "parameters": schema}])
    parameters_of(schema)


@pytest.mark.parametrize("form", FORMS)
def test_a_call_has_them_in_each_form(form: str, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    template, write = FORMS[form]
    special = SPECIAL if form == "xml" else ("<|im_start|>", "<|im_end|>", "<|tool_call|>")
    tokenizer = scripted_lm(tmp_path / "m", {}, template, special).tokenizer
    tools = ToolSet(tokenizer, [{"name": "f", "parameters": BEHIND}], "f", parallel=False)

    def ends(text: str) -> bool:
        grammar = grammar_of(tokenizer, ebnf=tools.lark())
        for token in tokenizer.encode(text, add_bos=False):
            if not int(grammar.allowed()[token // 32]) >> token % 32 & 1:
                return False
            grammar.accept(token)
        return grammar.ended

    whole = write([("f", {"a": 3, "s": "C"})])
    assert ends(whole)
    assert not ends(write([("f", {})]))
    assert not ends(write([("f", {"a": 3})]))
    assert tools.format
    opening = tools.format.opening  # its token is decoded with a mark of its own
    shown = whole.replace(opening, MARK + opening) if tools.call_token is not None else whole
    for streams in (False, True):
        reader = tools.reader(streams=streams)
        (call,) = (part for part in reader.add(shown) if isinstance(part, ToolCall))
        assert json.loads(call.arguments) == {"a": 3, "s": "C"}


def test_functions_in_python_are_told_with_them() -> None:
    assert 'def f(a: int, s: Literal["C", "F"]):' in python_tools(
        [{"name": "f", "parameters": BEHIND}]
    )


@pytest.mark.parametrize("kind", ["string", ["null"], 5])
def test_arguments_are_always_an_object(kind: Any, tmp_path: Path) -> None:
    tokenizer = scripted_lm(tmp_path / "m", {}, TOOL_TEMPLATE, SPECIAL[:2]).tokenizer
    with pytest.raises(InvalidArgumentError, match="of an object"):
        ToolSet(tokenizer, [{"name": "f", "parameters": {"type": kind}}], "f").lark()
