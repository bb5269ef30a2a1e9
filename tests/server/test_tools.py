"""Calls of functions: what the model is told, held to, and what is read out of its reply."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx.text.chat_template import CHATML, Template

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

from openai.types.chat import ChatCompletionMessage  # noqa: E402

from minicpm_mlx.server.http.api_error import ApiError  # noqa: E402
from minicpm_mlx.server.tool_calling import (  # noqa: E402
    CallReader,
    Function,
    Toolbox,
    ToolCall,
)
from minicpm_mlx.server.tool_formats import JsonForm, XmlForm, form_of  # noqa: E402

HERMES = """{%- if tools %}<|im_start|>system
You may call functions, described here:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Write a call as <tool_call>
{"name": ..., "arguments": {...}}
</tool_call><|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""As Hermes and many after it write calls."""

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


@pytest.mark.parametrize(("form", "write"), [(JsonForm(), as_json), (XmlForm(), as_xml)])
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
    for form in (JsonForm(), XmlForm()):
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
    ],
    ids=lambda text: text[:30],
)
def test_what_is_no_good_call_stays_text(text):
    form = form_of(text)
    assert form is not None
    assert joined(read(text, form, [7, 3])) == (text, [])


def test_values_have_the_types_of_their_schema():
    text = """<function name='weather'>
      <param name="city"><![CDATA[a <b> & </function> c]]></param><param name="days">3</param>
    </function>"""
    expected = {"city": "a <b> & </function> c", "days": 3}
    assert joined(read(text, XmlForm(), [10] * 20)) == ("", [("weather", expected)])


def test_arguments_may_be_json_within_json():
    text = '<tool_call>{"name": "weather", "arguments": "{\\"days\\": 2}"}</tool_call>'
    assert joined(read(text, JsonForm(), [])) == ("", [("weather", {"days": 2})])


# Templates


def test_a_template_says_whether_it_takes_tools():
    assert Template(HERMES).takes_tools
    assert not Template(CHATML).takes_tools
    assert not Template("{% if tools %}").takes_tools  # it could not render them either
    with pytest.raises(mm.errors.TemplateError, match="tools"):
        Template(CHATML).render(ASKED, tools=TOOLS)


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


def speaking(demo: mm.LM, template: str) -> mm.LM:
    """The demo with another chat template."""
    tokenizer = copy.copy(demo.tokenizer)
    tokenizer.template = Template(template)
    return replace(demo, tokenizer=tokenizer)


def test_marks_that_are_special_tokens_are_held_to_by_number(demo):
    there = SimpleNamespace(lm=speaking(demo, HERMES))
    toolbox = Toolbox(there, [Function(name="time")], "required")
    assert not toolbox.keep_special
    assert toolbox._literal('a"<|im_start|>b') == '"a\\"" <[1]> "b"'
    toolbox.form = SimpleNamespace(opening="<|im_start|>call", closing="</call>")
    assert toolbox.keep_special


@pytest.fixture(scope="module", params=[HERMES, XML], ids=["json", "xml"])
def client(request: pytest.FixtureRequest, demo: mm.LM) -> Iterator[Any]:
    from support.serving import serving

    with (
        serving(speaking(demo, request.param)) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def call_of(choice: Any) -> tuple[str, Any]:
    [call] = choice.message.tool_calls
    assert call.id.startswith("call_")
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    return call.function.name, json.loads(call.function.arguments)


NAMED = {"type": "function", "function": {"name": "weather"}}


def test_a_required_call_is_one_of_the_tools(client):
    answer = client.chat.completions.create(
        model="demo",
        messages=ASKED,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=60,
    )
    assert call_of(answer.choices[0])[0] in FUNCTIONS


def test_a_named_call_follows_its_schema_and_streams_as_deltas(client):
    asked = {"model": "demo", "messages": ASKED, "tools": TOOLS, "tool_choice": NAMED}
    whole = client.chat.completions.create(**asked, max_tokens=60)
    name, arguments = call_of(whole.choices[0])
    assert name == "weather"
    assert arguments["city"] in ("Paris", "Rome")
    assert arguments["days"] in range(1, 10)
    chunks = list(client.chat.completions.create(**asked, max_tokens=60, stream=True))
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or ()]
    assert deltas[0].function.name == "weather"
    assert deltas[0].id
    assert {delta.index for delta in deltas} == {0}
    streamed = "".join(delta.function.arguments or "" for delta in deltas)
    assert json.loads(streamed) == arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_a_model_that_is_free_to_call_may_speak(client):
    asked = {"model": "demo", "messages": ASKED, "tools": TOOLS, "max_tokens": 6}
    answer = client.chat.completions.create(**asked, tool_choice="auto")
    assert answer.choices[0].message.content
    chunks = client.chat.completions.create(**asked, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content


def test_a_model_that_is_free_to_call_may_call(client):
    # After two such calls this one calls too; both ways to send them back are tried.
    [call] = [{"id": "1", "type": "function", "function": {"name": "time", "arguments": "{}"}}]
    said = ChatCompletionMessage(role="assistant", tool_calls=[call])
    asked = {"role": "user", "content": "time"}
    answer = client.chat.completions.create(
        model="demo",
        messages=[asked, said, asked, said.model_dump(), asked],
        tools=TOOLS[1:],
        max_tokens=40,
        extra_body={"repetition_penalty": 1},
    )
    assert call_of(answer.choices[0]) == ("time", {})


def test_responses_have_calls_as_items(client):
    tools = [{"type": "function", **tool["function"], "strict": None} for tool in TOOLS]
    asked = {
        "model": "demo",
        "input": ASKED,
        "tools": tools,
        "tool_choice": {"type": "function", "name": "weather"},
        "max_output_tokens": 60,
    }
    answer = client.responses.create(**asked)
    [call] = answer.output
    assert (call.type, call.name) == ("function_call", "weather")
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    again = client.responses.create(
        model="demo", input=[*ASKED, call, result], tools=tools, max_output_tokens=4
    )
    assert again.usage.input_tokens > answer.usage.input_tokens
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output[0].arguments == call.arguments
    assert kinds[2:-1] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]


ODD = [None, True, 5, "x", [], [1], {"a": None}, {"type": 5}, {"enum": 5}, {"enum": [1]}]


@pytest.mark.parametrize("odd", ODD, ids=str)
@pytest.mark.parametrize("name", ["properties", "required", "type", "$ref", "p", 'q"<'])
def test_odd_schemas_are_followed_or_refused(demo, name, odd):
    schema = {name: odd} if name in WEATHER or name == "$ref" else {"properties": {name: odd}}
    for template in (HERMES, XML):
        there = SimpleNamespace(lm=speaking(demo, template))
        toolbox = Toolbox(there, [Function(name="f", parameters=schema)], "f")
        with suppress(ApiError):
            assert asyncio.run(toolbox.grammar()) is not None


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        ({"tools": [{"type": "retrieval"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {
                                "id": "1",
                                "type": "function",
                                "function": {"name": "time", "arguments": "["},
                            }
                        ],
                    }
                ]
            },
            "arguments",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_contradicts_itself_is_refused(client, options, field):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            **{"model": "demo", "messages": ASKED, "tools": TOOLS, "max_tokens": 2} | options
        )
    assert field in refused.value.message


def test_calls_in_an_unknown_form_are_refused(demo):
    from support.serving import serving

    template = HERMES.replace("tool_call>", "call>")
    with serving(speaking(demo, template)) as live:
        answer = live.ask("POST", "/v1/chat/completions", {"messages": ASKED, "tools": TOOLS})
    assert answer.status == 400
    assert "form" in answer.json["error"]["message"]
