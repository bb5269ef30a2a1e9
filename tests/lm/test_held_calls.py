"""Calls that a model decides on are held to their schemas where a special token opens them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("llguidance")


import minicpm_mlx as mm
from minicpm_mlx.errors import InvalidArgumentError, MissingPackageError
from minicpm_mlx.lm.outputs import Piece, Stats, Transcript
from minicpm_mlx.lm.structured import grammar as structured
from minicpm_mlx.lm.tools.calls import MARK, CallDelta, ToolCall
from minicpm_mlx.lm.tools.held_calls import HeldCalls
from minicpm_mlx.lm.tools.tool_set import ToolSet, answer_grammar
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

FORMS = {
    "json": (TOOL_TEMPLATE, as_json, (*SPECIAL, "<tool_call>", "</tool_call>")),
    "xml": (TEMPLATE, as_xml, XML_SPECIAL),
    "python": (PYTHON, as_python, (*SPECIAL, "<|tool_call_start|>", "<|tool_call_end|>")),
}
WRONG = [
    ("get-weather", {"city": 5, "days": "many", "place": []}),
    ("get-weather", {"days": 99}),
    ("get-water", {"city": "Rome", "days": 3}),
    ("now", {"zone": "UTC"}),
]
PROSE = {
    "json": "Put {} into tags, `tool_call` by name. </tool_call> \x00 🙂",
    "xml": '#include <functional>\n/// <param name="a">b</param></function> <function>\n é',
    "python": "Write f(a=1) in ```python\nf(a=1)\n```. <|tool_call_end|>",
}
"""Text with special tokens that open no call."""


@pytest.fixture(scope="module", params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def lm(form: str, tmp_path_factory: pytest.TempPathFactory) -> mm.LM:
    template, write, special = FORMS[form]
    script = {f"wrong {i}": f"I try. {write([call])}" for i, call in enumerate(WRONG)}
    script |= {"both": f"I look. {write([ROME, NOW])}", "prose": PROSE[form]}
    script["later"] = f"{PROSE[form]} {write([ROME])} And so on."
    script["again"] = f"<think>\na\n</think>\n\nOne. <think>\n{write([WRONG[0]])}\n</think>\n\nTwo."
    return scripted_lm(tmp_path_factory.mktemp("held") / "m", script, template, special=special)


def spelled(lm: mm.LM, text: str) -> list[int]:
    """Tokens of a text in which no special token is taken."""
    return lm.tokenizer.encode(lm.tokenizer.typed(text), add_bos=False)


def held(lm: mm.LM, tools: Sequence[Any] = TOOLS, **options: Any) -> HeldCalls:
    grammar = answer_grammar(ToolSet(lm.tokenizer, tools, **options), None)
    assert isinstance(grammar, HeldCalls)
    return grammar


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_wrong_call_comes_out_valid(lm: mm.LM, number: int) -> None:
    reply = lm.generate(asked(f"wrong {number}"), tools=TOOLS, max_tokens=300)
    assert reply.text.strip().startswith("I try.")
    [(name, given)] = calls_of(reply)[:1]
    if name == "now":
        assert given == {}
    else:
        assert name == "get-weather"
        assert {"city", "days"} <= given.keys() <= {"city", "days", "place"}
        assert isinstance(given["city"], str)
        assert given["days"] in range(1, 10)


def test_text_is_free(lm: mm.LM, form: str) -> None:
    reply = lm.generate(asked("prose"), tools=TOOLS)
    assert (reply.text, reply.tool_calls) == (PROSE[form], ())
    later = lm.generate(asked("later"), tools=TOOLS)
    assert calls_of(later) == [ROME]
    assert later.text == f"{PROSE[form]}  And so on."
    one = lm.generate(asked("later"), tools=TOOLS, parallel_tool_calls=False)
    assert (calls_of(one), one.text) == ([ROME], f"{PROSE[form]} ")


def test_batches_and_speculation_hold_calls(lm: mm.LM) -> None:
    questions = [asked("wrong 0"), asked("prose"), asked("both")]
    for question, reply in zip(questions, lm.generate_batch(questions, tools=TOOLS), strict=True):
        alone = lm.generate(question, tools=TOOLS, speculate=False)
        assert (reply.text, calls_of(reply)) == (alone.text, calls_of(alone))
        drafted = lm.generate(question, tools=TOOLS)
        assert (drafted.text, calls_of(drafted)) == (alone.text, calls_of(alone))


def test_a_later_thought_is_free_and_has_no_calls(lm: mm.LM, form: str) -> None:
    if lm.tokenizer.thinking is None:
        pytest.skip("this form is of a model that does not think")
    reply = lm.generate(asked("again"), tools=TOOLS)
    assert (reply.text, reply.tool_calls) == ("One. Two.", ())
    assert MARK not in reply.thinking
    assert reply.thinking == "a" + FORMS[form][1]([WRONG[0]])


def test_stop_strings_name_the_mark(lm: mm.LM) -> None:
    opening = ToolSet(lm.tokenizer, TOOLS).format
    assert opening is not None
    for stop in (opening.opening, f"k. {opening.opening}", "look"):
        reply = lm.generate(asked("both"), tools=TOOLS, stop=[stop])
        assert reply.text == "I look. ".split(stop.removesuffix(opening.opening) or "\0")[0]
        assert reply.tool_calls == ()


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"uniqueItems": True}}},
        {"x-guidance": {}},
        {"properties": {"a": {"type": 5}}},
    ],
)
def test_calls_are_free_where_a_schema_cannot_be_held(lm: mm.LM, schema: dict[str, Any]) -> None:
    odd = {"name": "odd", "parameters": schema}
    for _ in range(2):  # the second time it is known
        reply = lm.generate(asked("both"), tools=[*TOOLS, odd])
        assert calls_of(reply) == [ROME, NOW]
    tools = ToolSet(lm.tokenizer, [*TOOLS, odd])
    assert answer_grammar(tools, None) is None
    assert not tools.is_held
    for strict in ({"tools": [*TOOLS, {**odd, "strict": True}]}, {"tool_choice": "required"}):
        with pytest.raises(InvalidArgumentError):
            lm.generate(asked("both"), **{"tools": [*TOOLS, odd], **strict})


def test_calls_are_free_without_the_extra(lm: mm.LM, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingPackageError("structured output needs the llguidance package")

    monkeypatch.setattr("minicpm_mlx.lm.tools.tool_set.grammar_of", lambda *_, **__: missing())
    assert calls_of(lm.generate(asked("both"), tools=TOOLS)) == [ROME, NOW]


def test_a_name_that_is_spelled_opens_no_call(lm: mm.LM, form: str) -> None:
    tools = ToolSet(lm.tokenizer, TOOLS)
    text = f"As in {FORMS[form][1]([WRONG[0]])}"
    grammar = held(lm)
    for token in spelled(lm, text):
        grammar.accept(token)
        assert grammar.allowed() is grammar.every
    ids = [*spelled(lm, text), *lm.tokenizer.encode(FORMS[form][1]([NOW]), add_bos=False)]
    for streams in (False, True):
        tools.is_held = streams
        reader, transcript = tools.reader(streams=streams), transcript_of(lm, tools)
        pieces = [*map(transcript.add, ids), transcript.finish(STATS)]
        parts = [part for piece in pieces for part in reader.read(piece)]
        assert "".join(part for part in parts if isinstance(part, str)) == text
        [call] = [part for part in parts if isinstance(part, ToolCall)]
        assert (call.name, json.loads(call.arguments)) == NOW
        whole = Piece(text="".join(piece.text for piece in pieces), finish_reason="stop")
        again = tools.reader(streams=streams).read(whole)
        assert [part for part in again if isinstance(part, str)] == [text]
        assert sum(isinstance(part, ToolCall) for part in again) == 1


def test_held_calls_come_in_parts(lm: mm.LM) -> None:
    tools = ToolSet(lm.tokenizer, TOOLS)
    answer_grammar(tools, None)
    reader, transcript = tools.reader(streams=True), transcript_of(lm, tools)
    reply = lm.generate(asked("both"), tools=TOOLS)
    parts = [part for token in reply.token_ids for part in reader.read(transcript.add(token))]
    assert sum(isinstance(part, CallDelta) for part in parts) > 4
    assert [part.name for part in parts if isinstance(part, ToolCall)] == ["get-weather", "now"]


def test_tokens_can_be_taken_back_anywhere(lm: mm.LM, form: str) -> None:
    texts = (PROSE[form], FORMS[form][1]([ROME]), " x ", FORMS[form][1]([NOW]), "end")
    ids = lm.tokenizer.encode("".join(texts), add_bos=False)
    grammar, masks = held(lm), []
    for token in ids:
        masks.append(grammar.allowed().tolist())
        grammar.accept(token)
    draw = random.Random(3)
    for _ in range(60):
        at, other = len(ids), grammar.copy()
        for _ in range(3):
            back = draw.randrange(at + 1)
            other.rollback(back)
            at -= back
            for token in ids[at : (end := draw.randrange(at, len(ids) + 1))]:
                assert other.allowed().tolist() == masks[at]
                other.accept(token)
                at += 1
            assert at == end
    with pytest.raises(InvalidArgumentError):
        grammar.rollback(len(ids) + 1)


def test_the_same_tools_are_compiled_once(lm: mm.LM, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = [{"name": f"again_{i}", "parameters": TOOLS[0]["function"]} for i in range(2)]
    tools = [{**tool, "parameters": {"type": "object"}} for tool in tools]
    made, matcher = [], structured._matcher
    monkeypatch.setattr(structured, "_matcher", lambda *a: made.append(a) or matcher(*a))
    first, second = held(lm, tools), held(lm, tools)
    assert len(made) == 1
    opening = first.opening
    first.accept(opening)
    first.accept(next(t for t in range(512) if first.allowed()[t // 32] >> (t % 32) & 1))
    assert second.in_text
    second.accept(opening)
    assert second.states[-1] == 0
    assert second.block is not first.block
    for i in range(structured.KEPT + 1):
        held(lm, [{"name": f"other_{i}"}])
    held(lm, tools)
    assert len(made) == 2 + structured.KEPT + 1


STATS = Stats(
    prompt_tokens=1, cached_tokens=0, completion_tokens=1, ttft=0, seconds=0, passes=1,
    peak_memory=0,
)  # fmt: skip


def transcript_of(lm: mm.LM, tools: ToolSet) -> Transcript:
    return Transcript(
        lm.tokenizer, (), skip_special=not tools.keep_special, token_marks=tools.token_marks
    )
