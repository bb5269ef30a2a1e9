"""Text parameters of calls in XML are held to what their schema says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance")

from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.lm.structured.grammar import grammar_of
from minicpm_mlx.lm.tools.tool_set import ToolSet, answer_grammar
from minicpm_mlx.lm.tools.xml_format import XmlToolFormat
from minicpm_mlx.text.tokenizer import Tokenizer
from support.apis import TOOL_TEMPLATE
from support.scripted_model import SPECIAL, TEMPLATE, scripted_lm

XML = TOOL_TEMPLATE.replace("<tool_call>", '<function name="..."><param name="...">').replace(
    "</tool_call>", "</param></function>"
)


@pytest.fixture(scope="module", params=["special tokens", "text"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of models whose tags are tokens of their own, and of others."""
    folder: Path = tmp_path_factory.mktemp("xml") / "m"
    by_token = request.param == "special tokens"
    special = SPECIAL if by_token else ("<|im_start|>", "<|im_end|>")
    template = TEMPLATE if by_token else XML
    return scripted_lm(folder, {}, template, special).tokenizer


def fits(tokenizer: Tokenizer, schema: dict[str, Any], inner: str) -> bool:
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "string", **schema}},
        "required": ["a"],
        "$defs": {"short": {"type": "string", "maxLength": 2}},
    }
    tools = ToolSet(tokenizer, [{"name": "f", "parameters": parameters}], "f", parallel=False)
    assert isinstance(tools.format, XmlToolFormat)
    grammar = grammar_of(tokenizer, ebnf=tools.lark())
    text = f'<function name="f"><param name="a">{inner}</param></function>'
    for token in tokenizer.encode(text, add_bos=False):
        if not int(grammar.allowed()[token // 32]) >> token % 32 & 1:
            return False
        grammar.accept(token)
    assert grammar.ended
    return True


GOOD_AND_BAD: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({}, ["", "x[0] = {1}", "a < b && c", "a\nb", "<![CDATA[a]b</tool>]]]>"], ["</function>"]),
    ({"pattern": "^[a-z]+/$"}, ["ab/", "<![CDATA[ab/]]>"], ["ab", "aB/", "<![CDATA[a]]>"]),
    ({"pattern": "b|\\d"}, ["abc", "x1"], ["ac", ""]),
    ({"minLength": 2, "maxLength": 3}, ["é🙂", "<![CDATA[<&]]>"], ["a", "abcd", "&lt;"]),
    ({"maxLength": 20_000}, ["", "b", "<![CDATA[b]]]>"], []),
    ({"enum": ["a<b", "c", 5]}, ["c", "<![CDATA[a<b]]>"], ["d", "5"]),
    ({"format": "date"}, ["2026-11-29"], ["2026-13-29", "today"]),
    ({"format": "uri"}, ["https://a.b/c?d=e%20f#g"], ["a b", "x"]),
    ({"format": "email"}, ["a.b@c.de"], ["a.b"]),
    ({"format": "ipv4"}, ["255.1.0.9"], ["256.1.0.9"]),
    ({"format": "uuid"}, ["12345678-1234-1234-1234-123456789abc"], ["12345678"]),
    ({"anyOf": [{"const": "a"}, {"pattern": "^b+$"}]}, ["a", "bb"], ["ab"]),
    ({"allOf": [{"minLength": 3}, {"pattern": "^b+$"}]}, ["bbb"], ["bb", "bba"]),
    ({"$ref": "#/$defs/short"}, ["ab"], ["abc"]),
]


@pytest.mark.parametrize(
    ("schema", "good", "bad"), GOOD_AND_BAD, ids=[json.dumps(row[0]) for row in GOOD_AND_BAD]
)
def test_texts_follow_their_schema(
    tokenizer: Tokenizer, schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not fits(tokenizer, schema, text)] == []
    assert [text for text in bad if fits(tokenizer, schema, text)] == []


def test_many_tools_have_room(tokenizer: Tokenizer) -> None:
    texts = {f"p{i}": {"type": "string", "description": "x" * 400} for i in range(8)}
    parameters = {"type": "object", "properties": texts, "required": list(texts)}
    tools = [{"name": f"tool{i}", "parameters": parameters, "strict": True} for i in range(64)]
    assert answer_grammar(ToolSet(tokenizer, tools), None) is not None


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": "^a|b$"},
        {"pattern": "(?=x)a"},
        {"pattern": "[a"},
        {"pattern": 5},
        {"format": "color"},
        {"minLength": -1},
        {"minLength": 10**6},
        {"enum": [1]},
        {"oneOf": [{"minLength": 1}, {"maxLength": 3}]},
        {"x-guidance": {}},
        {"contains": "a"},
    ],
    ids=json.dumps,
)
def test_what_cannot_be_held_is_refused(tokenizer: Tokenizer, schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError):
        fits(tokenizer, schema, "a")
