"""Objects of closed schemas have the properties that are named, and no others."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.lm.structured.closed_schema import COPIES, closed

INTEGER = {"type": "integer"}
A, B, C = ({"properties": {name: INTEGER}, "required": [name]} for name in "abc")
NODE = {"properties": {"v": INTEGER, "next": {"$ref": "#/$defs/node"}}, "required": ["v"]}
DEFS = {"$defs": {"node": NODE}}


def valid(schema: dict[str, Any], value: Any) -> bool:
    validator = pytest.importorskip("jsonschema_rs")
    return bool(validator.validator_for(schema).is_valid(value))


@pytest.mark.parametrize(
    ("schema", "fits", "fails"),
    [
        (A, [{"a": 1}], [{"a": 1, "x": 1}]),
        ({"properties": {"o": A}}, [{}, {"o": {"a": 1}}], [{"o": {"a": 1, "x": 1}}]),
        ({"items": A}, [[{"a": 1}]], [[{"a": 1, "x": 1}]]),
        ({"type": "object"}, [{"x": 1}], []),
        ({**A, "additionalProperties": True}, [{"a": 1, "x": "y"}], []),
        ({**A, "additionalProperties": INTEGER}, [{"a": 1, "x": 1}], [{"a": 1, "x": "y"}]),
        ({"patternProperties": {"^p": INTEGER}}, [{"p1": 1}], [{"q": 1}]),
        ({**A, "required": ["a", "b"]}, [{"a": 1, "b": "x"}], [{"a": 1}]),
        ({"allOf": [A, B]}, [{"a": 1, "b": 2}], [{"a": 1}, {"a": 1, "b": 2, "x": 1}]),
        ({**A, "allOf": [B]}, [{"a": 1, "b": 2}], [{"a": 1, "b": 2, "x": 1}]),
        ({"anyOf": [A, {"type": "null"}]}, [None, {"a": 1}], [{"a": 1, "x": 1}]),
        ({**A, "anyOf": [B, C]}, [{"a": 1, "b": 1}, {"a": 1, "c": 1}], [{"a": 1, "b": 1, "x": 1}]),
        ({**A, "oneOf": [{"required": ["a"]}]}, [{"a": 1}], [{"a": 1, "x": 1}]),
        (
            {"anyOf": [A, {**B, "additionalProperties": True}]},
            [{"a": 1}, {"b": 1, "x": 1}],
            [{"a": 1, "x": 1}],
        ),
        ({"allOf": [A, {"additionalProperties": True}]}, [{"a": 1, "x": 1}], []),
        (
            {"$ref": "#/$defs/node", **DEFS},
            [{"v": 1, "next": {"v": 2}}],
            [{"v": 1, "x": 1}, {"v": 1, "next": {"v": 2, "x": 1}}],
        ),
        (
            {"allOf": [{"$ref": "#/$defs/node"}, A], **DEFS},
            [{"v": 1, "a": 2, "next": {"v": 2}}],
            [{"v": 1, "a": 2, "x": 1}, {"v": 1, "a": 2, "next": {"v": 2, "a": 1}}],
        ),
    ],
)
def test_what_is_not_named_is_not_allowed_unless_it_is_stated(
    schema: dict[str, Any], fits: list[Any], fails: list[Any]
) -> None:
    closed_schema = closed(schema)
    for value in fits:
        assert valid(schema, value)
        assert valid(closed_schema, value)
    for value in fails:
        assert not valid(closed_schema, value)


NAMES = st.sampled_from("abcd")
OBJECTS = st.dictionaries(st.sampled_from("abcdx"), st.sampled_from([1, "y"]), max_size=4)


def _named(names: list[str], parts: list[dict[str, Any]], ref: str | None) -> dict[str, Any]:
    schema: dict[str, Any] = {"properties": dict.fromkeys(names, INTEGER)}
    return schema | ({"allOf": parts} if parts else {}) | ({"$ref": ref} if ref else {})


REFERENCES = st.sampled_from([None, "#/$defs/one", "#/$defs/two"])
SCHEMAS = st.recursive(
    st.builds(_named, st.lists(NAMES), st.just([]), REFERENCES),
    lambda inner: st.builds(_named, st.lists(NAMES), st.lists(inner, max_size=3), REFERENCES),
    max_leaves=6,
)


@given(schema=SCHEMAS, value=OBJECTS)
def test_schemas_of_one_object_allow_each_others_properties(
    schema: dict[str, Any], value: dict[str, Any]
) -> None:
    definitions = {"one": A, "two": {"properties": {"d": INTEGER}, "$ref": "#/$defs/one"}}
    whole = {**schema, "$defs": definitions}
    # The standard's own word for it, which the grammars do not know.
    expected = valid({**whole, "unevaluatedProperties": False}, value)
    assert valid(closed(whole), value) == expected


@pytest.mark.parametrize("odd", [None, True, 5, "x", [], [1], {"a": None}, {"a": 5}])
def test_what_is_no_schema_is_left_for_others_to_refuse(odd: Any) -> None:
    for keyword in ("properties", "patternProperties", "required", "allOf", "$ref", "$defs"):
        assert closed({keyword: odd})[keyword] == odd
        closed({**A, keyword: odd, "anyOf": [B, {"$ref": "#/properties"}]})


def test_combinations_of_references_have_a_limit() -> None:
    definitions: dict[str, Any] = {"n0": A}
    for n in range(1, 12):
        below = {"$ref": f"#/$defs/n{n - 1}"}
        branches = [{"properties": {f"{side}{n}": INTEGER}, **below} for side in "xy"]
        definitions[f"n{n}"] = {"anyOf": branches}
    with pytest.raises(InvalidArgumentError, match=f"more than {COPIES}"):
        closed({"$ref": "#/$defs/n11", "$defs": definitions, **B})
