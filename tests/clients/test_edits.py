"""Edits of settings files against merging the same data in Python."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import hypothesis.strategies as st
import pytest
import yaml as package
from hypothesis import given, settings

from minicpm_mlx.clients import jsonc, toml, yaml
from minicpm_mlx.clients.merge import merge
from minicpm_mlx.errors import InvalidArgumentError

scalars = st.none() | st.booleans() | st.integers() | st.text("aä /*\"'#:\n-{", max_size=6)
names = st.sampled_from(["id", "name", "a", "b", "ü", "#x", "/*"])
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(names, v, max_size=3), max_leaves=8
)
objects = st.dictionaries(names, values, max_size=4)
additions = st.recursive(
    scalars,
    lambda v: (
        st.lists(v, max_size=1)
        | st.lists(scalars, max_size=3, unique=True)
        | st.dictionaries(names, v)
    ),
    max_leaves=8,
)
added = st.dictionaries(names, additions, max_size=4)


@settings(max_examples=60)
@given(objects, added, st.sampled_from([None, 2, 4, "\t"]), st.booleans())
def test_json_is_merged_as_data_is(old: Any, new: Any, indent: Any, comments: bool):
    text = json.dumps(old, indent=indent, ensure_ascii=False)
    if comments and indent:
        text = re.sub(r"([\[{,])\n", r"\1 // it's \"a\n/* , */", text)
        text = re.sub(r"(?<![\[{,])\n(\s*[\]}])", r", // ]\n\1", text)
    assert jsonc.parse(text) == old
    changed = jsonc.update(text, new)
    assert jsonc.parse(changed) == merge(old, new)
    assert jsonc.update(changed, new) == changed
    assert changed.count("/* , */") == text.count("/* , */") or merge(old, new) != old


@settings(max_examples=60)
@given(objects, added, st.booleans())
def test_yaml_is_merged_as_data_is(old, new, flow: bool):
    text = package.safe_dump(old, sort_keys=False, allow_unicode=True, default_flow_style=flow)
    changed = yaml.update(text, new)
    assert yaml.parse(changed) == merge(old, new)
    assert yaml.update(changed, new) == changed


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("{}", '{\n  "a": {\n    "b": 1\n  }\n}'),
        ('{"x": 1}', '{"x": 1,\n  "a": {\n    "b": 1\n  }\n}'),
        ('{\n\t"a": {}\n}', '{\n\t"a": {\n\t\t"b": 1\n\t}\n}'),
        ('{"a": {"b": 2 /* was */, "c": 3}}', '{"a": {"b": 1 /* was */, "c": 3}}'),
        ('{\n  "x": 1, // one\n  // two\n}', None),
    ],
)
def test_json_is_changed_in_place(text: str, changed: str | None):
    found = jsonc.update(text, {"a": {"b": 1}})
    assert found == changed or (changed is None and text[:-2] in found)


def test_toml_is_merged_as_data_is():
    old = 'a.b = 1\n[[list]]\nname = "x"\n[c]\nd = {e = 2} # e\n[c.f]\ng = 3\n'
    new = {"a": {"b": 2, "h": 3}, "c": {"d": {"e": 4}, "f": {"i": 5}}, "j": {"k": 6}}
    changed = toml.update(old, new)
    assert toml.parse(changed) == merge(toml.parse(old), new)
    assert "# e" in changed
    assert toml.update(changed, new) == changed


def test_aliases_of_yaml_that_loop_or_multiply_are_refused() -> None:
    names = "abcdefghij"
    lines = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise(names)]
    for text in ("a: &a [*a]\n", "\n".join(["a: &a [x, x]", *lines])):
        with pytest.raises(InvalidArgumentError, match="alias"):
            yaml.update(text, {"models": [{"name": "x"}]})
