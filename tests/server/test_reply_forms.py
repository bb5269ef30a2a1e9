"""The fields by which OpenAI's, vLLM's, SGLang's and llama.cpp's clients ask for a form."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from support.apis import SMALL

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

if TYPE_CHECKING:
    from support.serving import Live

ROUTES = ("/v1/chat/completions", "/v1/completions")
PAIR = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
DECIDED = {"structured_outputs": {"json": PAIR, "disable_additional_properties": True}}
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"json": {"enum": [1, 2]}}}, "1|2"),
    ({"structured_outputs": {"json": '{"enum": [1, 2]}'}}, "1|2"),
    ({"structured_outputs": {"json": {"const": 7}, "json_object": False}}, "7"),
    ({"structured_outputs": {"json_object": True}}, "{.*"),
    ({"structured_outputs": {"regex": "[A-C]{3}"}}, "[A-C]{3}"),
    ({"structured_outputs": {"choice": ["Berlin", "Paris"], "json": None}}, "Berlin|Paris"),
    ({"structured_outputs": {"grammar": 'start: "yes" | "no"'}}, "yes|no"),
    ({"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}}, "yes|no"),
    (DECIDED, r'\{\s*"a"\s*:\s*1\s*\}'),
    ({"guided_json": '{"enum": [1, 2]}'}, "1|2"),
    ({"regex": "[A-C]{3}"}, "[A-C]{3}"),
    ({"ebnf": 'root ::= "yes" | "no"'}, "yes|no"),
    ({"json_schema": {"enum": [1, 2]}}, "1|2"),
    ({"json_schema": '{"enum": [1, 2]}'}, "1|2"),
    ({"grammar": 'root ::= "yes" | "no"'}, "yes|no"),
    ({"response_format": {"type": "json_object", "schema": {"const": 7}}}, "7"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": 7}}}}, "7"),
]


def ask(server: Live, path: str, **more: Any) -> Any:
    return server.ask("POST", path, SMALL[path] | {"max_tokens": 40} | more)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(("form", "fits"), FORMS, ids=str)
def test_a_reply_has_the_form(
    tiny_server: Live, path: str, form: dict[str, Any], fits: str
) -> None:
    answer = ask(tiny_server, path, **form)
    assert answer.status == 200, answer.body
    [choice] = answer.json["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    assert re.fullmatch(fits, text.strip(), re.DOTALL), text


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"structured_outputs": {}}, "structured_outputs must have one of"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs must have one of"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "got json and regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "[a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": "["}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": {"type": "hiccup"}}}, "structured_outputs.json"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "exclude each other"),
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "exclude each other"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "exclude each other"),
        ({"json_schema": "[1]"}, "json_schema"),
        ({"response_format": {"type": "json_object", "schema": 123}}, "response_format.schema"),
        ({"response_format": {"type": "sound"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "schema is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": None}}}, "schema"),
    ],
    ids=str,
)
def test_a_form_that_is_none_or_several_is_refused_by_name(
    tiny_server: Live, path: str, form: dict[str, Any], words: str
) -> None:
    answer = ask(tiny_server, path, **form)
    assert answer.status == 400
    assert words in answer.json["error"]["message"]


@pytest.mark.parametrize("path", ROUTES)
def test_an_empty_form_asks_for_none(tiny_server: Live, path: str) -> None:
    empty = dict.fromkeys(("grammar", "regex", "ebnf", "json_schema", "guided_regex"), "")
    answers = [ask(tiny_server, path, **more) for more in ({}, empty)]
    assert [answer.status for answer in answers] == [200, 200]
    assert answers[0].json["choices"] == answers[1].json["choices"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("n", [1, 2])
def test_every_chunk_has_the_usage_so_far_if_it_is_wanted(
    tiny_server: Live, path: str, n: int
) -> None:
    from support.apis import sse

    def usages(**options: bool) -> list[Any]:
        answer = ask(tiny_server, path, stream=True, stream_options=options, max_tokens=4, n=n)
        assert answer.status == 200, answer.body
        return sse(answer.body)

    *chunks, last = usages(include_usage=True, continuous_usage_stats=True)
    counts: dict[int, list[int]] = {}
    for chunk in chunks:
        [choice], usage = chunk["choices"], chunk["usage"]
        assert usage["prompt_tokens"] == last["usage"]["prompt_tokens"] > 0
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        counts.setdefault(choice["index"], []).append(usage["completion_tokens"])
    assert all(numbers == sorted(numbers) for numbers in counts.values())
    assert {numbers[-1] for numbers in counts.values()} == {4}
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 4 * n)
    *chunks, last = usages(include_usage=True, continuous_usage_stats=False)
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert last["usage"]["completion_tokens"] == 4 * n
    for options in ({"continuous_usage_stats": True}, {"include_usage": False}):
        assert not any(chunk.get("usage") for chunk in usages(**options))
