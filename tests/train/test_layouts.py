"""Each layout of a row, to the same conversation."""

from __future__ import annotations

from typing import Any

import pytest

from minicpm_mlx.errors import DataError
from minicpm_mlx.train.data.layouts import (
    Conversation,
    Document,
    Judged,
    Preference,
    recognise,
)

ASK = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
WORSE = {"role": "assistant", "content": "b"}
LONGER = [ASK, REPLY, {"role": "user", "content": "q2"}]


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        ({"messages": [ASK, REPLY]}, "chat messages", [ASK, REPLY]),
        ({"messages": [SYSTEM, ASK, REPLY]}, "chat messages", [SYSTEM, ASK, REPLY]),
        ({"messages": [*LONGER, REPLY]}, "chat messages", [*LONGER, REPLY]),
        (
            {
                "messages": [
                    {"role": "developer", "content": "s"},
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}],
                    },
                    {"role": "assistant", "content": "a", "tool_calls": None, "name": "x"},
                ]
            },
            "chat messages",
            [SYSTEM, {"role": "user", "content": "qr"}, REPLY],
        ),
        ({"conversations": [human("q"), gpt("a")]}, "ShareGPT", [ASK, REPLY]),
        (
            {
                "conversations": [{"from": "user", "value": "q"}, {"from": "bot", "value": "a"}],
                "system": "s",
            },
            "ShareGPT",
            [SYSTEM, ASK, REPLY],
        ),
        (
            {"conversations": [{"from": "system", "value": "s"}, human("q"), gpt("a")]},
            "ShareGPT",
            [SYSTEM, ASK, REPLY],
        ),
        ({"conversations": [ASK, REPLY], "system": ""}, "ShareGPT", [ASK, REPLY]),
        ({"instruction": "q", "input": "", "output": "a"}, "Alpaca", [ASK, REPLY]),
        ({"instruction": "q", "output": "a", "input": None}, "Alpaca", [ASK, REPLY]),
        (
            {"instruction": "q", "input": "i", "output": "a", "system": "s"},
            "Alpaca",
            [SYSTEM, {"role": "user", "content": "q\ni"}, REPLY],
        ),
        (
            {"instruction": "q2", "input": "", "output": "a", "history": [["q", "a"]]},
            "Alpaca",
            [*LONGER, REPLY],
        ),
        ({"prompt": "q", "completion": "a"}, "prompt and completion", [ASK, REPLY]),
        ({"prompt": [ASK], "completion": [REPLY]}, "prompt and completion", [ASK, REPLY]),
        ({"prompt": "q", "response": "a"}, "prompt and response", [ASK, REPLY]),
        ({"question": "q", "answer": "a"}, "question and answer", [ASK, REPLY]),
        ({"query": "q", "response": "a"}, "query and response", [ASK, REPLY]),
        ({"input": "q", "output": "a"}, "input and output", [ASK, REPLY]),
        (
            {"prompt": "p", "input": "q", "output": "a"},
            "input and output",
            [{"role": "user", "content": "p\nq"}, REPLY],
        ),
        # The same text a second time, as hubs' data sets have it.
        ({"messages": [ASK, REPLY], "prompt": "q", "text": "qa"}, "chat messages", [ASK, REPLY]),
    ],
)
def test_a_conversation_is_read_from_each_layout(
    row: dict[str, Any], name: str, messages: list[dict[str, str]]
) -> None:
    form = recognise(row)
    assert (form.name, form.kind) == (name, "sft")
    assert form.read(row) == Conversation(messages)


def test_a_text_is_a_document_as_it_stands() -> None:
    form = recognise({"text": " <用户>q<AI>a\n"})
    assert (form.name, form.kind) == ("plain text", "sft")
    assert form.read({"text": " <用户>q<AI>a\n"}) == Document(" <用户>q<AI>a\n")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, [ASK]),
        ({"prompt": "q", "system": "s", "chosen": "a", "rejected": "b"}, [SYSTEM, ASK]),
        ({"prompt": [SYSTEM, ASK], "chosen": [REPLY], "rejected": [WORSE]}, [SYSTEM, ASK]),
        ({"prompt": "q", "chosen": [REPLY], "rejected": [WORSE]}, [ASK]),
        ({"chosen": [ASK, REPLY], "rejected": [ASK, WORSE]}, [ASK]),
        ({"prompt": "q", "chosen": [ASK, REPLY], "rejected": [ASK, WORSE]}, [ASK]),
        ({"prompt": [ASK], "chosen": [ASK, REPLY], "rejected": [ASK, WORSE]}, [ASK]),
        ({"prompt": "q", "chosen": [*LONGER, REPLY], "rejected": [*LONGER, WORSE]}, LONGER),
        ({"prompt": "q2", "chosen": [*LONGER, REPLY], "rejected": [*LONGER, WORSE]}, LONGER),
        (
            {"system": "s", "chosen": [ASK, REPLY], "rejected": [ASK, WORSE]},
            [SYSTEM, ASK],
        ),
        ({"conversations": [human("q")], "chosen": gpt("a"), "rejected": gpt("b")}, [ASK]),
        ({"messages": [ASK], "chosen": REPLY, "rejected": WORSE}, [ASK]),
        (
            {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"},
            [{"role": "user", "content": "q\ni"}],
        ),
        ({"question": "q", "chosen": "a", "rejected": "b"}, [ASK]),
    ],
)
def test_a_preference_is_read_from_each_layout(
    row: dict[str, Any], prompt: list[dict[str, str]]
) -> None:
    form = recognise(row)
    assert form.kind == "preference"
    assert form.read(row) == Preference(prompt, "a", "b")


@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, REPLY], "label": ...},
        {"messages": [ASK, REPLY], "kto_tag": ...},
        {"conversations": [human("q"), gpt("a")], "kto_tag": ...},
        {"prompt": "q", "completion": "a", "label": ...},
        {"instruction": "q", "input": "", "output": "a", "kto_tag": ...},
    ],
)
def test_a_judged_reply_is_read_from_each_layout(row: dict[str, Any], good: bool) -> None:
    row = {name: good if value is ... else value for name, value in row.items()}
    form = recognise(row)
    assert form.kind == "kto"
    assert form.read(row) == Judged([ASK, REPLY], good)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a", "label": "spam"},
        {"instruction": "q", "input": "", "output": "a", "label": 3},
    ],
)
def test_a_label_of_classification_makes_no_judged_reply(row: dict[str, Any]) -> None:
    form = recognise(row)
    assert form.kind == "sft"
    assert "label" not in form.fields


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "found none; rename the fields"),
        ({"instruction": "q"}, "expected the fields messages, or .*; found instruction;"),
        ({"chosen": "a"}, "expected both chosen and rejected, found no rejected"),
        ({"messages": [ASK, REPLY], "tools": [{}]}, "tools: expected text alone"),
        ({"messages": {}}, "messages: expected a list of messages, found an object"),
        ({"messages": []}, "messages: expected at least one message, found none"),
        ({"messages": ["q"]}, r"messages\[0\]: expected a message \{…\}, found text"),
        ({"messages": [{"content": "q"}]}, r"messages\[0\]: .* found no role; add it"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: .* found no content; add it"),
        (
            {"messages": [ASK, {"role": "tool", "content": "x"}]},
            r"messages\[1\].role: expected system, user or assistant .*, found 'tool'",
        ),
        ({"messages": [{"role": 3, "content": "x"}]}, r"messages\[0\].role: .*, found a number"),
        (
            {"messages": [{"role": "user", "content": None}]},
            r"messages\[0\].content: expected text, found null",
        ),
        (
            {"messages": [{"role": "user", "content": 3}]},
            r"messages\[0\].content: expected text, found a number",
        ),
        (
            {"messages": [{"role": "user", "content": " \n"}]},
            r"messages\[0\].content: expected text, found it empty",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"messages\[0\].content\[0\]: expected a part .*, found one of type 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": ["x"]}]},
            r"messages\[0\].content\[0\]: expected a part .*, found text",
        ),
        (
            {"messages": [ASK, {**REPLY, "tool_calls": [{"id": 1}]}]},
            r"messages\[1\].tool_calls: expected text alone",
        ),
        ({"messages": [ASK, {**REPLY, "weight": 0}]}, r"messages\[1\].weight: expected text alone"),
        ({"messages": [REPLY, ASK]}, "message 1: expected user, found assistant"),
        ({"messages": [ASK, REPLY, WORSE]}, "message 3: expected user, found assistant"),
        ({"messages": [ASK, ASK, REPLY]}, "message 2: expected assistant, found user"),
        ({"messages": [ASK, SYSTEM, REPLY]}, "message 2: expected assistant, found system"),
        ({"messages": [ASK, REPLY, ASK]}, "reply as the last message, found user"),
        ({"messages": [SYSTEM]}, "reply as the last message, found only a system message"),
        ({"conversations": [ASK, REPLY], "system": 3}, "system: expected text, found a number"),
        (
            {"conversations": [{"from": "system", "value": "t"}, human("q")], "system": "s"},
            "message 2: expected user, found system",
        ),
        ({"instruction": "", "output": "a"}, "instruction: expected text, found it empty"),
        ({"instruction": "q", "output": ""}, "output: expected text, found it empty"),
        (
            {"instruction": "q", "output": "a", "history": "x"},
            "history: expected a list of pairs, found text",
        ),
        (
            {"instruction": "q", "output": "a", "history": [["x"]]},
            r"history\[0\]: expected \[question, answer\], found a list",
        ),
        ({"prompt": "q", "completion": None}, "completion: expected text, found null"),
        ({"text": ["x"]}, "text: expected text, found a list"),
        ({"text": "a\0b"}, "text: expected text, found a NUL character at 2"),
        ({"text": "a\ud800"}, "text: expected valid Unicode, found half .* at character 2"),
        (
            {"messages": [ASK, REPLY], "label": "true"},
            "label: expected true or false, found text; .* or remove the field",
        ),
        ({"messages": [ASK, REPLY], "kto_tag": None}, "kto_tag: .*, found null"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "another reply than chosen"),
        (
            {
                "chosen": [ASK, REPLY],
                "rejected": [{"role": "user", "content": "other"}, WORSE],
            },
            "expected the messages of chosen up to the last one, found others",
        ),
        ({"chosen": [ASK, REPLY], "rejected": "b"}, "the messages of chosen up to the last"),
        (
            {"prompt": "other", "chosen": [ASK, REPLY], "rejected": [ASK, WORSE]},
            "prompt: expected what comes before the last message of chosen, found another",
        ),
        ({"chosen": "a", "rejected": "b"}, "chosen: message 1: expected user, found assistant"),
        (
            {"prompt": [ASK, REPLY], "chosen": "a", "rejected": "b"},
            "chosen: message 3: expected user",
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
