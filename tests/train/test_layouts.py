"""Each layout of a row is read as the same conversation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from minicpm_mlx.errors import DataError
from minicpm_mlx.train.data.examples import (
    Conversation,
    Document,
    Judged,
    Preference,
    TemplateOptions,
)
from minicpm_mlx.train.data.layouts import recognise
from minicpm_mlx.train.data.unread import unread_fields


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


ASK, REPLY, WORSE = (
    user("q"),
    {"role": "assistant", "content": "a"},
    {"role": "assistant", "content": "b"},
)
SYSTEM, SHAREGPT_SYSTEM = {"role": "system", "content": "s"}, {"from": "system", "value": "s"}
LONGER = [ASK, REPLY, user("q2")]
CHOSEN, REJECTED = [ASK, REPLY], [ASK, WORSE]
PARTS = [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]
ALPACA = {"instruction": "q", "output": "a"}


CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CALLED = {"name": "weather", "arguments": {"city": "Oslo"}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": CALLED}],
}
IDENTIFIED = {**CALL, "tool_calls": [{"id": "a", "type": "function", "function": CALLED}]}
RESULT = {"role": "tool", "content": "rain"}
TALK = [ASK, CALL, RESULT, REPLY]


def written(call: dict[str, Any]) -> dict[str, Any]:
    """A call with its arguments as JSON text."""
    return {**call, "arguments": json.dumps(call["arguments"])}


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        ({"messages": [{**SYSTEM, "content": ""}, ASK, REPLY]}, "chat messages", [ASK, REPLY]),
        ({"messages": [{**SYSTEM, "content": None}, ASK, REPLY]}, "chat messages", [ASK, REPLY]),
        ({"conversations": [{"from": "system", "value": " "}, ASK, REPLY]}, "ShareGPT", CHOSEN),
        ({"prompt": "q", "system": [], "completion": "a"}, "prompt and completion", [ASK, REPLY]),
        ({"messages": [SYSTEM, ASK, REPLY]}, "chat messages", [SYSTEM, ASK, REPLY]),
        ({"messages": [*LONGER, REPLY]}, "chat messages", [*LONGER, REPLY]),
        (
            {"messages": [{**SYSTEM, "role": "developer"}, ASK, {**REPLY, "tool_calls": None}]},
            "chat messages",
            [SYSTEM, ASK, REPLY],
        ),
        ({"messages": [user(PARTS), REPLY]}, "chat messages", [user("qr"), REPLY]),
        ({"conversations": [human("q"), gpt("a")]}, "ShareGPT", [ASK, REPLY]),
        (
            {"conversations": [human("q"), gpt("a")], "system": "s"},
            "ShareGPT",
            [SYSTEM, ASK, REPLY],
        ),
        (
            {"conversations": [SHAREGPT_SYSTEM, human("q"), {"from": "bot", "value": "a"}]},
            "ShareGPT",
            [SYSTEM, ASK, REPLY],
        ),
        ({"conversations": [ASK, REPLY], "system": ""}, "ShareGPT", [ASK, REPLY]),
        ({**ALPACA, "input": ""}, "Alpaca", [ASK, REPLY]),
        ({**ALPACA, "input": None}, "Alpaca", [ASK, REPLY]),
        ({**ALPACA, "input": "i", "system": "s"}, "Alpaca", [SYSTEM, user("q\ni"), REPLY]),
        ({**ALPACA, "instruction": "q2", "history": [["q", "a"]]}, "Alpaca", [*LONGER, REPLY]),
        ({"prompt": "q", "completion": "a"}, "prompt and completion", [ASK, REPLY]),
        ({"prompt": [ASK], "completion": [REPLY]}, "prompt and completion", [ASK, REPLY]),
        ({"prompt": "q", "response": "a"}, "prompt and response", [ASK, REPLY]),
        ({"question": "q", "answer": "a"}, "question and answer", [ASK, REPLY]),
        ({"query": "q", "response": "a"}, "query and response", [ASK, REPLY]),
        ({"input": "q", "output": "a"}, "input and output", [ASK, REPLY]),
        ({"prompt": "p", "input": "q", "output": "a"}, "input and output", [user("p\nq"), REPLY]),
        # Data sets of hubs often repeat the text in other fields.
        ({"messages": [ASK, REPLY], "prompt": "q", "text": "qa"}, "chat messages", [ASK, REPLY]),
    ],
)
def test_a_conversation_is_read_from_each_layout(
    row: dict[str, Any], name: str, messages: list[dict[str, str]]
) -> None:
    layout = recognise(row)
    assert (layout.name, layout.kind) == (name, "sft")
    assert layout.read(row) == Conversation(messages)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK, "tools": [TOOL]},
        {"messages": TALK, "tools": [TOOL["function"]]},
        {"messages": TALK, "tools": json.dumps([TOOL])},
        {"messages": TALK, "tools": [json.dumps(TOOL)]},
        {"messages": [ASK, {**CALL, "tool_calls": [CALLED]}, RESULT, REPLY], "tools": TOOL},
        {
            "messages": [
                ASK,
                {**CALL, "content": None, "tool_calls": [written(CALLED)]},
                *TALK[2:],
            ],
            "tools": [TOOL],
        },
        {
            "messages": [
                ASK,
                {"role": "assistant", "function_call": written(CALLED)},
                {**RESULT, "role": "function"},
                REPLY,
            ],
            "functions": [TOOL["function"]],
        },
        {
            "conversations": [
                human("q"),
                {"from": "function_call", "value": json.dumps(CALLED)},
                {"from": "observation", "value": "rain"},
                gpt("a"),
            ],
            "system": "",
            "tools": json.dumps([TOOL["function"]]),
        },
        {"prompt": TALK[:3], "completion": "a", "tools": [TOOL]},
        {"prompt": [ASK], "completion": TALK[1:], "tools": [TOOL]},
    ],
)
def test_calls_and_results_are_read_from_each_layout(row: dict[str, Any]) -> None:
    layout = recognise(row)
    example = layout.read(row)
    assert example == Conversation(TALK, options=TemplateOptions((TOOL,)))
    assert not unread_fields(row, layout, example)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, {**REPLY, "reasoning_content": "t"}]},
        {"messages": [ASK, {**REPLY, "thinking": "t", "reasoning": None}]},
        {"prompt": "q", "completion": {**REPLY, "reasoning": "t"}},
        {"question": "q", "answer": "a", "thinking": "t"},
        {**ALPACA, "reasoning": "t"},
    ],
)
def test_a_thought_is_read_from_each_of_its_names(row: dict[str, Any]) -> None:
    layout = recognise(row)
    example = layout.read(row)
    assert example == Conversation([ASK, {**REPLY, "reasoning_content": "t"}])
    assert not unread_fields(row, layout, example)


def test_a_preference_may_be_between_calls_and_thoughts() -> None:
    thinking = {**WORSE, "reasoning_content": "t"}
    variables = {"enable_thinking": True}
    row = {"prompt": "q", "chosen": CALL, "rejected": [thinking], "tools": [TOOL]}
    found = recognise(row).read({**row, "chat_template_kwargs": variables})
    assert found == Preference([ASK], CALL, thinking, TemplateOptions((TOOL,), variables))


@pytest.mark.parametrize(
    ("mark", "value", "unlearned"),
    [
        *(("loss", value, {1}) for value in (False, 0, 0.0)),
        *(("train", value, set()) for value in (True, 1, None)),
        ("weight", 0, {1}),
        ("weight", 1, set()),
    ],
)
def test_a_mark_says_whether_a_reply_is_learned(mark: str, value: Any, unlearned: set[int]) -> None:
    for asked in (ASK, {**ASK, mark: 0}, {**ASK, mark: None}):
        row = {"messages": [asked, {**REPLY, mark: value}, user("q2"), {**WORSE, mark: True}]}
        found = recognise(row).read(row)
        assert found == Conversation([ASK, REPLY, user("q2"), WORSE], frozenset(unlearned))


@pytest.mark.parametrize(
    ("row", "names"),
    [
        (
            {"messages": [{**ASK, "name": "Eve"}, {**REPLY, "id": 3}]},
            "messages.name messages.id",
        ),
        ({"messages": [ASK, {**REPLY, "name": None, "tool_calls": []}], "source": ""}, ""),
        (
            {"messages": [user([{"type": "text", "text": "q", "cache_control": {"a": 1}}]), REPLY]},
            "messages.content.cache_control",
        ),
        ({"prompt": "q", "completion": {**REPLY, "score": 1}}, "completion.score"),
        ({"messages": CHOSEN, "prompt": "q", "text": "q a"}, "text"),
        ({"prompt": "q", "input": "x", "chosen": "a", "rejected": "b"}, "input"),
        ({"messages": [ASK], "system": "x", "chosen": "a", "rejected": "b"}, "system"),
        (
            {"prompt": "q", "messages": CHOSEN, "chosen": CHOSEN, "rejected": REJECTED, "score": 1},
            "score",
        ),
    ],
)
def test_fields_that_are_not_read_are_named(row: dict[str, Any], names: str) -> None:
    layout = recognise(row)
    assert unread_fields(row, layout, layout.read(row)).keys() == set(names.split())


def test_a_text_is_a_document_as_it_stands() -> None:
    row = {"text": " <用户>q<AI>a\n"}
    layout = recognise(row)
    assert (layout.name, layout.kind) == ("plain text", "sft")
    assert layout.read(row) == Document(" <用户>q<AI>a\n")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, [ASK]),
        ({"prompt": "q", "system": "s", "chosen": "a", "rejected": "b"}, [SYSTEM, ASK]),
        ({"prompt": [SYSTEM, ASK], "chosen": [REPLY], "rejected": [WORSE]}, [SYSTEM, ASK]),
        ({"chosen": CHOSEN, "rejected": REJECTED}, [ASK]),
        ({"prompt": "q", "chosen": CHOSEN, "rejected": REJECTED}, [ASK]),
        ({"prompt": [ASK], "chosen": CHOSEN, "rejected": REJECTED}, [ASK]),
        ({"prompt": "q", "chosen": [*LONGER, REPLY], "rejected": [*LONGER, WORSE]}, LONGER),
        ({"prompt": "q2", "chosen": [*LONGER, REPLY], "rejected": [*LONGER, WORSE]}, LONGER),
        ({"system": "s", "chosen": CHOSEN, "rejected": REJECTED}, [SYSTEM, ASK]),
        ({"conversations": [human("q")], "chosen": gpt("a"), "rejected": gpt("b")}, [ASK]),
        ({"messages": [ASK], "chosen": REPLY, "rejected": WORSE}, [ASK]),
        ({"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"}, [user("q\ni")]),
        ({"question": "q", "chosen": "a", "rejected": "b"}, [ASK]),
        ({"input": "q", "chosen": "a", "rejected": "b"}, [ASK]),
        # UltraFeedback, binarized: `messages` is chosen again.
        ({"prompt": "q", "messages": CHOSEN, "chosen": CHOSEN, "rejected": REJECTED}, [ASK]),
        ({"messages": REJECTED, "chosen": CHOSEN, "rejected": REJECTED}, [ASK]),
        ({"messages": [SYSTEM, *CHOSEN], "chosen": "a", "rejected": "b"}, [SYSTEM, ASK]),
        ({"prompt": CHOSEN, "chosen": "a", "rejected": "b"}, [ASK]),
        (
            {"chosen": [{**SYSTEM, "content": ""}, *CHOSEN], "rejected": REJECTED},
            [ASK],
        ),
    ],
)
def test_a_preference_is_read_from_each_layout(
    row: dict[str, Any], prompt: list[dict[str, str]]
) -> None:
    layout = recognise(row)
    assert layout.kind == "preference"
    assert layout.read(row) == Preference(prompt, REPLY, WORSE)


@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize(
    ("row", "tag"),
    [
        ({"messages": [ASK, REPLY]}, "label"),
        ({"conversations": [human("q"), gpt("a")]}, "kto_tag"),
        ({"prompt": "q", "completion": "a"}, "label"),
        (ALPACA, "kto_tag"),
    ],
)
def test_a_judged_reply_is_read_from_each_layout(row: dict[str, Any], tag: str, good: bool) -> None:
    layout = recognise({**row, tag: good})
    assert layout.kind == "kto"
    assert layout.read({**row, tag: good}) == Judged([ASK, REPLY], good)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [SHAREGPT_SYSTEM, human("q"), gpt("a")], "system": "s"},
        {"prompt": [SYSTEM, ASK], "completion": "a", "system": "s"},
        {"conversations": [SHAREGPT_SYSTEM, human("q"), gpt("a")], "system": "", "tools": "[]"},
    ],
)
def test_a_system_text_stated_twice_and_tools_that_are_none_change_nothing(
    row: dict[str, Any],
) -> None:
    layout = recognise(row)
    example = layout.read(row)
    assert example == Conversation([SYSTEM, ASK, REPLY])
    assert not unread_fields(row, layout, example)


@pytest.mark.parametrize("row", [{"text": "a", "label": "spam"}, {**ALPACA, "label": 3}])
def test_a_label_of_classification_makes_no_judged_reply(row: dict[str, Any]) -> None:
    layout = recognise(row)
    assert layout.kind == "sft"
    assert "label" not in layout.fields


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "found none; rename the fields"),
        ({"x": "q"}, "expected the fields messages, or .*; found x;"),
        ({"instruction": "q"}, "expected output beside instruction, found instruction; add it"),
        ({"id": 1, "prompt": "q"}, "completion or response beside prompt, found id, prompt; add"),
        ({"completion": "a", "label": True}, "expected prompt beside completion"),
        ({"data": [{"text": "a"}]}, "expected one sample, found a list of objects in data"),
        (
            {
                "prompt": "q",
                "system": "another",
                "chosen": [SYSTEM, ASK, REPLY],
                "rejected": [SYSTEM, ASK, {**REPLY, "content": "b"}],
            },
            "system: .* own system message, found another text",
        ),
        ({"messages": [ASK, REPLY], "images": ["a.png"]}, "images: expected text alone"),
        ({"text": "q", "tools": [TOOL]}, "tools: expected no such field beside text"),
        ({"messages": [ASK, REPLY], "thinking": "t"}, "thinking: expected no such field beside"),
        ({"messages": [ASK, REPLY], "tools": [{}]}, r"tools\[0\].name: expected the name"),
        ({"messages": [ASK, REPLY], "tools": "x"}, "tools: expected objects, or JSON as text"),
        ({"messages": [ASK, REPLY], "tools": [TOOL, TOOL]}, "tools: .* found weather twice"),
        ({"messages": [ASK, REPLY], "tools": [TOOL], "functions": [TOOL]}, "functions: .* both"),
        (
            {"messages": [ASK, REPLY], "tools": [{**TOOL, "type": "web_search"}]},
            r"tools\[0\].type: expected function, found 'web_search'",
        ),
        (
            {"messages": [ASK, REPLY], "chat_template_kwargs": "no"},
            "chat_template_kwargs: expected objects",
        ),
        (
            {"messages": [ASK, CALL], "tools": [{"name": "time"}]},
            r"message 2: expected a call of one of the tools \(time\), found 'weather'",
        ),
        ({"prompt": "q", "chosen": CALL, "rejected": {**CALL}}, "rejected: .* found the same"),
        (
            {"completion": {**REPLY, "thinking": "t"}, "prompt": "q", "thinking": "u"},
            "reasoning_content: expected the reply's own, found another",
        ),
        ({"conversations": [ASK, REPLY], "system": 3}, "system: expected text, found a number"),
        (
            {"conversations": [SYSTEM, ASK, REPLY], "system": "t"},
            "system: .* own system message, found another text",
        ),
        ({**ALPACA, "instruction": ""}, "instruction: expected text, found it empty"),
        ({**ALPACA, "output": ""}, "output: expected text, found it empty"),
        ({**ALPACA, "history": "x"}, "history: expected a list of pairs, found text"),
        (
            {**ALPACA, "history": [["x"]]},
            r"history\[0\]: expected \[question, answer\], found a list",
        ),
        ({"prompt": "q", "completion": None}, "completion: expected text, found null"),
        ({"text": ["x"]}, "text: expected text, found a list"),
        ({"text": "a\0b"}, "text: expected text, found a NUL character at 2"),
        ({"text": "a\ud800"}, "text: expected valid Unicode, found half .* at character 2"),
        (
            {"messages": [ASK, REPLY], "label": "true"},
            "label: expected true or false, found text; ",
        ),
        ({"messages": [ASK, REPLY], "kto_tag": None}, "kto_tag: .*, found null"),
        ({"messages": [ASK, REPLY], "label": 1}, "label: .*, found a number"),
        ({"chosen": "a"}, "expected both chosen and rejected, found no rejected"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "another reply than chosen"),
        (
            {"chosen": CHOSEN, "rejected": [user("x"), WORSE]},
            "the messages of chosen up to the last",
        ),
        ({"chosen": CHOSEN, "rejected": "b"}, "the messages of chosen up to the last"),
        (
            {"prompt": "other", "chosen": CHOSEN, "rejected": REJECTED},
            "prompt: expected what comes before the last message of chosen, found another",
        ),
        ({"chosen": "a", "rejected": "b"}, "prompt: expected the question .*, found none; add a"),
        ({"system": "s", "chosen": "a", "rejected": "b"}, "prompt: expected the question"),
        ({"chosen": [REPLY], "rejected": [WORSE]}, "prompt: expected the question"),
        ({"prompt": CHOSEN, "chosen": "c", "rejected": "b"}, "chosen: message 3: expected user"),
        (
            {"prompt": "q", "chosen": {**REPLY, "train": False}, "rejected": "b"},
            "a reply to be learned, found it marked",
        ),
        (
            {"messages": [ASK, {**REPLY, "loss": False}], "label": True},
            "the last reply to be learned, found it marked",
        ),
        ({"prompt": "q", "chosen": 1, "rejected": "b"}, "chosen: expected text, found a number"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "chosen: expected text, found it empty"),
    ],
)
def test_a_row_that_cannot_be_learned_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        recognise(row).read(row)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)  # what to do


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ({}, "messages: expected a list of messages, found an object"),
        ([], "messages: expected at least one message, found none"),
        (["q"], r"messages\[0\]: expected a message \{…\}, found text"),
        ([{"content": "q"}], r"messages\[0\]: .* found no role; add it"),
        ([{"role": "user"}], r"messages\[0\]: .* found no content; add it"),
        ([ASK, {"role": "tool", "content": "x"}], "message 2: expected assistant, found tool"),
        ([ASK, {"role": "critic", "content": "x"}], r"\[1\].role: expected .*, found 'critic'"),
        ([{"role": 3, "content": "x"}], r"messages\[0\].role: .*, found a number"),
        ([user(None)], r"messages\[0\].content: expected text, found null"),
        ([user(3)], r"messages\[0\].content: expected text, found a number"),
        ([user(" \n")], r"messages\[0\].content: expected text, found it empty"),
        ([user([{"type": "image_url"}])], r"content\[0\]: .*, found one of type 'image_url'"),
        ([user(["x"])], r"messages\[0\].content\[0\]: expected a part .*, found text"),
        ([ASK, {**REPLY, "tool_calls": [{"id": 1}]}], r"tool_calls\[0\].name: expected the name"),
        ([ASK, {**REPLY, "tool_calls": "x"}], r"messages\[1\].tool_calls: expected objects, or"),
        (
            [ASK, {**CALL, "tool_calls": [{"name": "f", "parameters": {}}]}, RESULT, REPLY],
            r"tool_calls\[0\].parameters: expected .*, found parameters, which is not read",
        ),
        (
            [ASK, {**CALL, "tool_calls": [{"name": "f", "arguments": "[1]"}]}],
            r"tool_calls\[0\].arguments: expected an object, or its JSON text, found text",
        ),
        ([ASK, {**CALL, "function_call": CALLED}], "expected calls once, found tool_calls, func"),
        ([{**ASK, "tool_calls": [CALLED]}, REPLY], r"\[0\].tool_calls: expected it in the assist"),
        ([{**ASK, "thinking": "t"}, REPLY], r"\[0\].thinking: expected it in the assistant's"),
        ([ASK, CALL, REPLY], "message 3: expected tool, found assistant; each message with"),
        ([ASK, CALL, RESULT, RESULT, REPLY], "message 4: expected assistant, found tool"),
        ([ASK, CALL, RESULT], "the assistant's reply as the last message, found tool"),
        (
            [ASK, IDENTIFIED, {**RESULT, "tool_call_id": "b"}, REPLY],
            r"message 3: expected the tool_call_id of a call before it \(a\), found 'b'",
        ),
        ([ASK, {**REPLY, "weight": 0.5}], r"\[1\].weight: expected true, .*, found 0.5; corr"),
        ([ASK, {**REPLY, "loss": "no"}], r"\[1\].loss: expected true, false, 0 or 1, found text"),
        ([{**ASK, "train": True}, REPLY], r"\[0\].train: expected only replies to be learned"),
        ([ASK, {**REPLY, "reasoning_content": 3}], r"\[1\].reasoning_content: expected text"),
        ([ASK, {**REPLY, "reasoning_content": "x", "content": ""}], r"\[1\].content: .* empty"),
        ([ASK, {**REPLY, "reasoning": "x", "thinking": "y"}], r"\[1\].thinking: expected the text"),
        ([REPLY, ASK], "message 1: expected user, found assistant"),
        ([ASK, REPLY, WORSE], "message 3: expected user, found assistant"),
        ([ASK, ASK, REPLY], "message 2: expected assistant, found user"),
        ([ASK, SYSTEM, REPLY], "message 2: expected assistant, found system"),
        ([SYSTEM, SYSTEM, ASK], "message 2: expected user, found system"),
        ([ASK, REPLY, ASK], "reply as the last message, found user"),
        ([SYSTEM], "reply as the last message, found only a system message"),
    ],
)
def test_messages_that_cannot_be_learned_are_named(messages: Any, message: str) -> None:
    test_a_row_that_cannot_be_learned_is_named({"messages": messages}, message)
