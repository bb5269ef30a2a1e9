"""Calls of functions: what the model is told, held to, and what is read out of its reply."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx.lm.tools.calls import CallReader, ToolCall
from minicpm_mlx.lm.tools.formats import JsonToolFormat
from minicpm_mlx.lm.tools.tool_set import detect_tool_format
from minicpm_mlx.lm.tools.xml_format import XmlToolFormat
from minicpm_mlx.text.chat_template import BUILTIN, CHATML, Template
from support.apis import TOOL_TEMPLATE, merged

pytest.importorskip("fastapi")

from minicpm_mlx.server.http.api_error import ApiError
from minicpm_mlx.server.tool_calling import Function, RequestTools

if TYPE_CHECKING:
    from support.serving import Live

HERMES = TOOL_TEMPLATE

XML = HERMES.replace(
    "<tool_call>\n{{ call.function | tojson }}\n</tool_call>",
    """<function name="{{ call.function.name }}">{% for key in call.function.arguments -%}
<param name="{{ key }}">{{ call.function.arguments[key] }}</param>{% endfor %}</function>""",
).replace(
    '<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>',
    '<function name="..."><param name="...">...</param></function>',
)
"""As MiniCPM 5 does."""

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TIME = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Forecast.", "parameters": WEATHER},
    },
    {"type": "function", "function": {"name": "time", "parameters": TIME}},
]
FUNCTIONS = {"weather": WEATHER, "time": TIME}
ASKED = [{"role": "user", "content": "What will the weather in Rome be for 3 days?"}]


# Reading calls


def read(text: str, form: Any, sizes: list[int]) -> list[str | ToolCall]:
    """What a reader finds in `text`, given in pieces."""
    reader = CallReader(form, FUNCTIONS)
    found: list[str | ToolCall] = []
    for size in sizes:
        found += reader.add(text[:size])
        text = text[size:]
    return [*found, *reader.add(text), *reader.finish()]


def joined(found: list[str | ToolCall]) -> tuple[str, list[tuple[str, Any]]]:
    text = "".join(one for one in found if isinstance(one, str))
    calls = [(one.name, json.loads(one.arguments)) for one in found if isinstance(one, ToolCall)]
    return text, calls


ARGUMENTS = st.fixed_dictionaries({"city": st.text(), "days": st.integers()})


def as_json(arguments: dict[str, Any]) -> str:
    call = json.dumps({"name": "weather", "arguments": arguments}).replace("<", "\\u003c")
    return f"<tool_call>\n{call}\n</tool_call>"


def as_xml(arguments: dict[str, Any]) -> str:
    params = "".join(
        f'<param name="{name}">{value if isinstance(value, int) else escape(value)}</param>'
        for name, value in arguments.items()
    )
    return f'<function name="weather">{params}</function>'


@pytest.mark.parametrize(
    ("form", "write"), [(JsonToolFormat(), as_json), (XmlToolFormat(), as_xml)]
)
@given(
    calls=st.lists(ARGUMENTS, max_size=3),
    before=st.text(alphabet="ab <\n", max_size=5),
    sizes=st.lists(st.integers(1, 9), max_size=60),
)
def test_calls_are_read_however_the_text_comes(form, write, calls, before, sizes):
    text = before + "\n".join(write(arguments) for arguments in calls)
    expected = [("weather", arguments) for arguments in calls]
    assert joined(read(text, form, sizes)) == (before, expected)


@given(
    text=st.text(alphabet='<tool_cal>/{}"name:\n]', max_size=80), sizes=st.lists(st.integers(1, 5))
)
def test_text_without_calls_is_left_as_it_is(text, sizes):
    for form in (JsonToolFormat(), XmlToolFormat()):
        assert joined(read(text, form, sizes)) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>',
        "<tool_call>not json</tool_call>",
        '<tool_call>{"name": "weather"',
        "<tool_call>" + "[" * 5000 + "</tool_call>",
        '<function name="other"></function>',
        "<function>weather</function>",
        '<function name="weather"><param name="city">Rome</param>',
        '<function name="weather"><param name="city">Rome</function>',
        '<function name="weather"><param name="city">' + "<![CDATA[x]]>" * 40 + "</function",
        '<function name="weather">' + '<param name="city">' * 20_000 + "</function>",
        '<tool_call>{"name": ["weather"], "arguments": {}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"city": "\\ud800"}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"days": 1e999}}</tool_call>',
        '<tool_call>{"name": "weather", "arguments": {"days": NaN}}</tool_call>',
    ],
    ids=lambda text: text[:30],
)
def test_what_is_no_good_call_stays_text(text):
    form = detect_tool_format(text)
    assert form is not None
    assert joined(read(text, form, [7, 3])) == (text, [])


def test_values_have_the_types_of_their_schema():
    text = """<function name='weather'>
      <param name="city"><![CDATA[a <b> & </function> c]]></param><param name="days">3</param>
    </function>"""
    expected = {"city": "a <b> & </function> c", "days": 3}
    assert joined(read(text, XmlToolFormat(), [10] * 20)) == ("", [("weather", expected)])


def test_sections_are_joined_and_types_follow_the_schema():
    several = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    function = {"properties": {"a": {"type": "string"}, "n": {"type": ["integer"]}, "s": several}}
    text = """<function name="f"><param name="a"><![CDATA[x]]]]><![CDATA[>y]]></param>\
<param name="n">5</param><param name="s">5</param></function>"""
    *_, call = CallReader(XmlToolFormat(), {"f": function}).add(text)
    assert json.loads(call.arguments) == {"a": "x]]>y", "n": 5, "s": "5"}


def test_arguments_may_be_json_within_json():
    text = '<tool_call>{"name": "weather", "arguments": "{\\"days\\": 2}"}</tool_call>'
    assert joined(read(text, JsonToolFormat(), [])) == ("", [("weather", {"days": 2})])


# Templates


def test_a_template_says_whether_it_takes_tools():
    assert Template(HERMES).takes_tools
    assert not Template(CHATML).takes_tools
    assert not Template("{% if tools %}").takes_tools  # it could not render them either
    with pytest.raises(mm.errors.TemplateError, match="tools"):
        Template(CHATML).render(ASKED, tools=TOOLS)


def test_no_template_of_minicpms_takes_tools(server: Live):
    named = {card.template for card in mm.cards().values() if card.name != "demo"} - {None}
    assert named == {*BUILTIN}
    assert not any(Template(source).takes_tools for source in BUILTIN.values())
    answer = server.ask("POST", "/v1/chat/completions", {"messages": ASKED, "tools": TOOLS})
    assert answer.status == 400
    assert answer.json["error"]["param"] == "tools"


def test_tools_are_rendered_as_transformers_does():
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [
        *ASKED,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "time"}}]},
        {"role": "tool", "content": "noon"},
    ]
    [expected], _ = render_jinja_template(
        [turns], tools=TOOLS, chat_template=HERMES, add_generation_prompt=True
    )
    assert Template(HERMES).render(turns, tools=TOOLS) == expected


# Over HTTP


def speaking(lm: mm.LM, template: str) -> mm.LM:
    """A model with another chat template."""
    tokenizer = copy.copy(lm.tokenizer)
    tokenizer.template = Template(template)
    return replace(lm, tokenizer=tokenizer)


def test_marks_that_are_special_tokens_are_held_to_by_number(demo):
    there = SimpleNamespace(lm=speaking(demo, HERMES))
    toolbox = RequestTools(there, [Function(name="time")], "required")
    assert not toolbox.keep_special
    assert toolbox.literal('a"<|im_start|>b') == '"a\\"" <[1]> "b"'
    toolbox.format = SimpleNamespace(opening="<|im_start|>call", closing="</call>")
    assert toolbox.keep_special


@pytest.fixture(scope="module", params=[HERMES, XML], ids=["json", "xml"])
def live(request: pytest.FixtureRequest, tiny: mm.LM) -> Iterator[Live]:
    from support.serving import serving

    pytest.importorskip("llguidance")
    with serving(speaking(tiny, request.param)) as live:
        yield live


NAMED = {"type": "function", "function": {"name": "weather"}}


def test_the_clients_read_calls_and_send_them_back(live):
    openai = pytest.importorskip("openai")
    asked = {"model": "tiny", "messages": ASKED, "tools": TOOLS, "max_tokens": 200}
    asked |= {"tool_choice": NAMED, "parallel_tool_calls": False}
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        choice = client.chat.completions.create(**asked).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        [call] = choice.message.tool_calls
        assert call.id.startswith("call_")
        arguments = json.loads(call.function.arguments)
        assert arguments["city"] in ("Paris", "Rome")
        assert arguments["days"] in range(1, 10)
        deltas = [
            delta
            for chunk in client.chat.completions.create(**asked, stream=True)
            for delta in chunk.choices[0].delta.tool_calls or ()
        ]
        assert deltas[0].function.name == "weather"
        assert "".join(delta.function.arguments or "" for delta in deltas) == json.dumps(arguments)
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        for said in (choice.message, choice.message.model_dump()):
            again = client.chat.completions.create(
                **asked
                | {"messages": [*ASKED, said, result], "tool_choice": "auto"}
                | {"max_tokens": 2}
            )
            assert again.choices[0].message.content


def test_a_required_call_is_one_of_the_tools(live):
    body = {"messages": ASKED, "tools": TOOLS, "tool_choice": "required", "max_tokens": 200}
    body["parallel_tool_calls"] = False
    choice = live.ask("POST", "/v1/chat/completions", body).json["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] in FUNCTIONS


@pytest.mark.parametrize(
    "parameters",
    [
        None,
        {},
        {"type": "object"},
        {"type": "object", "properties": {}},
        {"$schema": "http://json-schema.org/draft-07/schema#"},
    ],
    ids=str,
)
def test_a_function_without_parameters_is_called_with_none(live, parameters):
    function = {"name": "time"} | ({} if parameters is None else {"parameters": parameters})
    body = {"messages": ASKED, "tools": [{"type": "function", "function": function}]}
    body |= {"tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 200}
    answer = live.ask("POST", "/v1/chat/completions", body)
    [call] = answer.json["choices"][0]["message"]["tool_calls"]
    assert call["function"]["arguments"] == "{}"


def test_a_call_has_the_parameters_that_are_named_and_no_others(live):
    place = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    parameters = {
        "properties": {"places": {"type": "array", "items": {"$ref": "#/$defs/place"}}},
        "required": ["places"],
        "$defs": {"place": place},
    }
    parameters["properties"]["places"] |= {"minItems": 1, "maxItems": 1}
    function = {"name": "weather", "parameters": parameters}
    body = {"messages": ASKED, "tools": [{"type": "function", "function": function}]}
    body |= {"tool_choice": NAMED, "parallel_tool_calls": False, "max_tokens": 300}
    answer = live.ask("POST", "/v1/chat/completions", body)
    [call] = answer.json["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"places": [{"city": "Rome"}]}


def test_a_template_is_told_of_an_object_without_parameters(tiny):
    there = SimpleNamespace(lm=speaking(tiny, HERMES))
    [described] = RequestTools(there, [Function(name="time")]).for_template
    expected = {"name": "time", "parameters": {"type": "object", "properties": {}}}
    assert described["function"] == expected


@pytest.mark.parametrize("stated", [None, True, {"type": "integer"}])
def test_arguments_that_a_function_does_not_have_are_left_out(stated):
    function = {"type": "object"} | ({} if stated is None else {"additionalProperties": stated})
    for form, text in (
        (JsonToolFormat(), '<tool_call>{"name": "now", "arguments": {"n": 1}}</tool_call>'),
        (XmlToolFormat(), '<function name="now"><param name="n">1</param></function>'),
    ):
        reader = CallReader(form, {"now": function})
        *_, call = reader.add(text)
        assert (json.loads(call.arguments) == {}) == (stated is None)


@pytest.mark.parametrize("arguments", ['"arguments": null', '"arguments": ""', '"other": 1'])
def test_a_call_without_arguments_has_none(arguments):
    text = f'<tool_call>{{"name": "time", {arguments}}}</tool_call>'
    assert joined(read(text, JsonToolFormat(), [])) == ("", [("time", {})])


def test_responses_have_calls_as_items(live):
    openai = pytest.importorskip("openai")
    tools = [{"type": "function", **tool["function"], "strict": None} for tool in TOOLS]
    asked = {"model": "tiny", "input": ASKED, "tools": tools, "max_output_tokens": 200}
    asked |= {"tool_choice": {"type": "function", "name": "weather"}, "parallel_tool_calls": False}
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        with client.responses.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            [call] = stream.get_final_response().output
        assert (call.type, call.name) == ("function_call", "weather")
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        again = client.responses.create(
            model="tiny", input=[*ASKED, call, result], tools=tools, max_output_tokens=2
        )
        assert again.usage.output_tokens == 2
    deltas = kinds.count("response.function_call_arguments.delta")
    assert deltas > 1
    assert kinds[2:-1] == [
        "response.output_item.added",
        *["response.function_call_arguments.delta"] * deltas,
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]


ODD = [None, True, 5, "x", [], [1], {"a": None}, {"type": 5}, {"enum": 5}, {"enum": [1]}]


@pytest.mark.parametrize("name", ["properties", "required", "type", "$ref", "p", 'q"<'])
def test_odd_schemas_are_followed_or_refused(tiny, name):
    for odd in ODD:
        schema = {name: odd} if name in WEATHER or name == "$ref" else {"properties": {name: odd}}
        for template in (HERMES, XML):
            there = SimpleNamespace(lm=speaking(tiny, template))
            toolbox = RequestTools(there, [Function(name="f", parameters=schema)], "f")
            with suppress(ApiError):
                assert asyncio.run(toolbox.grammar({})) is not None


def test_what_contradicts_itself_is_refused(tiny_server):
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": "["}}
    for options, field in (
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [call]}]}, "arguments"),
    ):
        body = merged({"messages": ASKED, "tools": TOOLS, "max_tokens": 2}, options)
        answer = tiny_server.ask("POST", "/v1/chat/completions", body)
        assert answer.status == 400
        assert field in answer.json["error"]["message"]


def test_calls_in_an_unknown_form_are_refused(tiny):
    from support.serving import serving

    template = HERMES.replace("tool_call>", "call>")
    with serving(speaking(tiny, template)) as live:
        answer = live.ask("POST", "/v1/chat/completions", {"messages": ASKED, "tools": TOOLS})
    assert answer.status == 400
    assert "form" in answer.json["error"]["message"]
