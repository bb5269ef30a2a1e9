"""Functions that a model may call, in each form: told, held to, and read in replies."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

import minicpm_mlx as mm
from minicpm_mlx.errors import InvalidArgumentError, TemplateError
from minicpm_mlx.lm.outputs import Piece, Stats, Transcript
from minicpm_mlx.lm.thinking_grammar import thinking_grammar
from minicpm_mlx.lm.tools.calls import Thought, ToolCall
from minicpm_mlx.lm.tools.tool_set import ToolSet, answer_grammar
from minicpm_mlx.text.chat_prompt import ChatPrompt
from minicpm_mlx.text.chat_template import CHATML, Template
from minicpm_mlx.text.thinking import ThinkingForm
from support.apis import TOOL_TEMPLATE
from support.calls import (
    NOW,
    PYTHON,
    ROME,
    SPECIAL,
    TOOLS,
    XML_SPECIAL,
    as_json,
    as_python,
    as_xml,
    asked,
    calls_of,
)
from support.scripted_model import TEMPLATE, scripted_lm

FORMS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "json": (TOOL_TEMPLATE, as_json),
    "xml": (TEMPLATE, as_xml),
    "python": (PYTHON, as_python),
    "python, told by us": (CHATML, as_python),
}
THOUGHT = f"Shall I? {as_json([NOW])} {as_xml([NOW])} {as_python([NOW])}"


@pytest.fixture(scope="module", params=FORMS)
def speaking(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that writes calls in one form, with the text of two."""
    template, write = FORMS[request.param]
    special = XML_SPECIAL if request.param == "xml" else (*SPECIAL, "<|tool_call|>")
    script = {"both": f"I look. {write([ROME, NOW])}", "rome": write([ROME]), "plain": "No call."}
    if request.param in ("xml", "python, told by us"):
        opening, closing = (
            ("<think>", "</think>")
            if request.param == "xml"
            else ("<|thought_start|>", "<|thought_end|>")
        )
        shown = THOUGHT if request.param != "xml" else THOUGHT.replace("<function", "< function")
        script["thought"] = f"{opening}\n{shown}\n{closing}\n\n{write([NOW])}"
    return scripted_lm(tmp_path_factory.mktemp("tools") / "m", script, template, special=special)


def test_calls_are_told_from_text(speaking: mm.LM) -> None:
    reply = speaking.generate(asked("both"), tools=TOOLS)
    assert (reply.text.strip(), calls_of(reply)) == ("I look.", [ROME, NOW])
    pieces = list(speaking.stream(asked("both"), tools=TOOLS))
    assert "".join(piece.text for piece in pieces) == reply.text
    assert [call.name for piece in pieces for call in piece.tool_calls] == ["get-weather", "now"]
    one = speaking.generate(asked("both"), tools=TOOLS, parallel_tool_calls=False)
    assert calls_of(one) == [ROME]
    assert calls_of(speaking.generate(asked("plain"), tools=TOOLS)) == []


def test_text_within_a_thought_is_never_a_call(speaking: mm.LM) -> None:
    if speaking.chat_prompt(asked("thought"), tools=TOOLS).thinking is None:
        pytest.skip("this form is of models that do not think")
    reply = speaking.generate(asked("thought"), tools=TOOLS)
    assert calls_of(reply) == [NOW]
    assert reply.thinking.startswith("Shall I?")
    assert "tool_call_end" in reply.thinking
    for choice in ("required", "now"):
        pytest.importorskip("llguidance")
        forced = speaking.generate(asked("thought"), tools=TOOLS, tool_choice=choice)
        assert (forced.thinking, calls_of(forced)[0]) == (reply.thinking, NOW)


def test_forced_calls_can_be_taken_back_with_and_without_a_thought(speaking: mm.LM) -> None:
    """Speculation does so; text marks begin as calls do."""
    pytest.importorskip("llguidance")
    prompt, tools = (
        speaking.chat_prompt(asked("plain"), tools=TOOLS),
        ToolSet(speaking.tokenizer, TOOLS, "now", parallel=False),
    )
    if prompt.thinking is None:
        pytest.skip("this form is of models that do not think")
    call = as_xml([NOW]) if prompt.thinking.is_by_token else as_python([NOW])
    thought = f"{prompt.thinking.opening}\nx\n{prompt.thinking.closing}\n\n"
    for text in (call, thought + call):
        ids = speaking.tokenizer.encode(text, add_bos=False)
        grammar = _forced(speaking, prompt, tools)
        masks = []
        for token in ids:
            masks.append(grammar.allowed().tolist())
            grammar.accept(token)
        assert grammar.ended
        for back in range(1, len(ids) + 1):
            other = grammar.copy()
            other.rollback(back)
            for token, mask in zip(ids[-back:], masks[-back:], strict=True):
                assert other.allowed().tolist() == mask
                other.accept(token)
            assert other.ended


def _forced(lm: mm.LM, prompt: ChatPrompt, tools: ToolSet) -> Any:
    return thinking_grammar(lm.tokenizer, prompt, None, answer_grammar(tools, None))


STRICT = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]


def test_calls_of_strict_tools_are_held_to_their_schema_in_free_text(speaking: mm.LM) -> None:
    pytest.importorskip("llguidance")
    for question in ("both", "plain", "rome"):
        free = speaking.generate(asked(question), tools=TOOLS)
        strict = speaking.generate(asked(question), tools=STRICT)
        assert (strict.text, calls_of(strict)) == (free.text, calls_of(free))
    one = speaking.generate(asked("both"), tools=STRICT, parallel_tool_calls=False)
    assert calls_of(one) == [ROME]
    for tool in (STRICT[1:], [{**STRICT[1], "function": {"name": "other", "strict": True}}]):
        other = speaking.generate(asked("rome"), tools=tool, max_tokens=120)
        assert {name for name, _ in calls_of(other)} <= {"now", "other"}


def test_choices_hold_in_each_form(speaking: mm.LM) -> None:
    pytest.importorskip("llguidance")
    for question in ("plain", "rome"):
        for choice, names in (
            ("required", {"get-weather", "now"}), ("now", {"now"}), ("get-weather", {"get-weather"})
        ):  # fmt: skip
            reply = speaking.generate(
                asked(question),
                tools=TOOLS,
                tool_choice=choice,
                parallel_tool_calls=False,
                think=False,
            )
            [(name, given)] = calls_of(reply)
            assert name in names
            assert reply.text.strip() == ""
            if name == "get-weather":
                assert isinstance(given["city"], str)
                assert given["days"] in range(1, 10)
    reply = speaking.generate(asked("rome"), tools=TOOLS, tool_choice="none")
    assert reply.tool_calls == ()


def test_calls_and_results_go_back_into_the_conversation(speaking: mm.LM) -> None:
    reply = speaking.generate(asked("rome"), tools=TOOLS)
    told = [*asked("rome"), reply.message(), {"role": "tool", "content": "sunny"}]
    text = speaking.tokenizer.render(told, tools=TOOLS).text
    call = told[1]["tool_calls"][0]
    function = call["function"]
    function = {**function, "arguments": json.loads(function["arguments"])}
    reply_again = {**told[1], "tool_calls": [{**call, "function": function}]}
    parsed = [told[0], reply_again, told[2]]
    assert text == speaking.tokenizer.render(parsed, tools=TOOLS).text
    assert "sunny" in text
    assert "Rome" in text


def test_batches_and_chat_take_tools_as_streams_do(speaking: mm.LM) -> None:
    questions = [asked("both"), asked("plain")]
    batch = speaking.generate_batch(questions, tools=TOOLS)
    for question, reply in zip(questions, batch, strict=True):
        alone = speaking.generate(question, tools=TOOLS)
        assert (reply.text, calls_of(reply)) == (alone.text, calls_of(alone))
    one = speaking.generate_batch(questions[:1], tools=TOOLS, parallel_tool_calls=False)
    assert calls_of(one[0]) == [ROME]
    text, history = speaking.chat("rome", tools=TOOLS)
    assert text.strip() == ""
    [call] = history[-1]["tool_calls"]
    assert call["function"]["name"] == "get-weather"
    answer, history = speaking.chat("plain", history, role="tool", tools=TOOLS)
    assert answer == "No call."
    assert [message["role"] for message in history] == ["user", "assistant", "tool", "assistant"]


def test_batches_hold_to_required_calls(speaking: mm.LM) -> None:
    pytest.importorskip("llguidance")
    options: Any = {"tool_choice": "now", "parallel_tool_calls": False, "think": False}
    batch = speaking.generate_batch([asked("plain")] * 2, tools=TOOLS, **options)
    assert [calls_of(reply) for reply in batch] == [[NOW], [NOW]]


def test_contradictions_are_refused(speaking: mm.LM) -> None:
    for options, field in (
        ({"tools": [TOOLS[1], TOOLS[1]]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": TOOLS, "tool_choice": "other"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ):
        with pytest.raises(InvalidArgumentError) as error:
            speaking.generate(asked("rome"), **options)
        assert error.value.field == field
    with pytest.raises(InvalidArgumentError, match="messages"):
        speaking.generate("plain text", tools=TOOLS)


def test_a_model_without_tools_refuses_them(tiny: mm.LM) -> None:
    tokenizer = copy.copy(tiny.tokenizer)
    tokenizer.template = Template(CHATML)
    with pytest.raises(TemplateError, match="tools"):
        replace(tiny, tokenizer=tokenizer).generate(asked("rome"), tools=TOOLS)


STATS = Stats(
    prompt_tokens=1,
    cached_tokens=0,
    completion_tokens=1,
    ttft=0,
    seconds=0,
    passes=1,
    peak_memory=0,
)
WORDS = [
    "So ",
    "it ",
    "< ",
    "<|",
    "<tool",
    "\n",
    "```python\n",
    "f(a=1)",
    "{",
    "é🙂",
    "</",
    "&amp;",
]
VALUES = ["Rome", "", "a\nb", "<b> & c", "x" * 20, "🙂 é", "'\"\\", "]] >", "f(a=1)", "True", "5"]
JUNK = [
    '<tool_call>{"name": "nope"}</tool_call>',
    "<tool_call>[</tool_call>",
    '<function name="nope"></function>',
    "<function></function>",
    "<|tool_call_start|>now(<|tool_call_end|>",
    "<|tool_call_start|>\n```python\nnope()\n```\n<|tool_call_end|>",
    "</tool_call></function><|tool_call_end|>",
    "<tool_call>",
    "<function",
    "<|tool_call_start|>",
]


def _reply(draw: random.Random, write: Callable[[Any], str]) -> tuple[str, list[Any] | None]:
    """A reply, and its calls where no junk can hide one."""
    parts, expected = [], list[Any]()
    sound = True
    if draw.random() < 0.5:
        parts.append(f"<think>\n{draw.choice(WORDS)}{write([NOW])}\n</think>\n\n")
    for _ in range(draw.randrange(4)):
        kind = draw.randrange(4)
        if kind == 0:
            parts.append(draw.choice(JUNK))
            sound = False
        elif kind == 1:
            calls = [
                ("get-weather", {"city": draw.choice(VALUES), "days": draw.randrange(9)})
                if draw.random() < 0.7
                else NOW
                for _ in range(draw.randrange(1, 3))
            ]
            parts.append(write(calls))
            expected += calls
        else:
            parts.append("".join(draw.choice(WORDS) for _ in range(draw.randrange(4))))
    return "".join(parts), expected if sound else None


def test_replies_parse_alike_wherever_they_are_cut(speaking: mm.LM) -> None:
    """250 replies of each of four forms, cut at every token, and in two at some."""
    tokenizer, tools = speaking.tokenizer, ToolSet(speaking.tokenizer, TOOLS)
    write = next(
        write for template, write in FORMS.values() if template == tokenizer.template.source
    )
    draw = random.Random(18)
    for _ in range(250):
        text, expected = _reply(draw, write)
        pieces = _pieces(speaking, tools, text)
        whole = _parsed(tools, pieces[:0], pieces)
        for at in draw.sample(range(1, len(pieces) + 1), min(5, len(pieces))):
            assert _parsed(tools, pieces[:at], pieces[at:]) == whole, text
        assert _parsed(tools, *([piece] for piece in pieces)) == whole, text
        if expected is not None:
            assert whole[2] == expected, text


def _pieces(lm: mm.LM, tools: ToolSet, text: str) -> list[Piece]:
    ids = lm.tokenizer.special_tokens
    form = ThinkingForm(
        opening="<think>",
        closing="</think>",
        opening_id=ids["<think>"],
        closing_id=ids["</think>"],
    )
    transcript = Transcript(
        lm.tokenizer,
        (),
        skip_special=not tools.keep_special,
        token_marks=tools.token_marks,
        thinking=form,
    )
    pieces = [transcript.add(token) for token in lm.tokenizer.encode(text, add_bos=False)]
    last = transcript.finish(STATS)
    return [*pieces, last]


def _parsed(tools: ToolSet, *groups: Sequence[Piece]) -> tuple[str, str, list[Any]]:
    reader = tools.reader()
    parts = [
        part
        for group in groups
        if group
        for part in reader.read(
            Piece(
                text="".join(piece.text for piece in group),
                thinking="".join(piece.thinking for piece in group),
                finish_reason=group[-1].finish_reason,
            )
        )
    ]
    thought = "".join(part.text for part in parts if isinstance(part, Thought))
    text = "".join(part for part in parts if isinstance(part, str))
    calls = [(p.name, json.loads(p.arguments)) for p in parts if isinstance(p, ToolCall)]
    return thought, text, calls
