"""Thoughts told from answers: in streams, batches, under budgets, forms and stop strings."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.lm.outputs import Stats, Transcript, collect
from minicpm_mlx.lm.structured.grammar import grammar_of
from minicpm_mlx.text.chat_prompt import chat_prompt
from minicpm_mlx.text.thinking import ThinkingForm, ThoughtReader
from support.scripted_model import SPECIAL, scripted_lm

THOUGHT, ANSWER = "Two and two.\nSo: 4?  \n yes", "It is **4**.\n\nReally <ok>."
SCRIPT = {
    "2 + 2": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}",
    "Hello": "Hi!",
    "json": '<think>\nAn object.\n</think>\n\n{"a": 1}',
    "typed": "I write &lt;think> so: <thin k> ok",
    "endless": "<think>\n" + "on and on " * 30,
}
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> mm.LM:
    return scripted_lm(tmp_path_factory.mktemp("scripted") / "thinker", SCRIPT)


def ask(lm: mm.LM, text: str, **options: Any) -> mm.Completion:
    return lm.generate([{"role": "user", "content": text}], max_tokens=None, **options)


@pytest.mark.parametrize("think", [None, True])
@pytest.mark.parametrize("speculate", [True, False])
def test_a_thought_and_its_answer_come_apart(lm: mm.LM, think: bool, speculate: bool) -> None:
    pieces = list(lm.stream(QUESTION, max_tokens=None, think=think, speculate=speculate))
    whole = collect(pieces)
    assert (whole.thinking, whole.text, whole.finish_reason) == (THOUGHT, ANSWER, "stop")
    kinds = [piece.kind for piece in pieces if piece.text or piece.thinking]
    assert kinds == sorted(kinds, reverse=True)  # "thinking", then "answer"
    marks = 2 - bool(think)
    body = len(lm.tokenizer.encode(f"\n{THOUGHT}\n", add_bos=False)) - bool(think)
    assert whole.stats.thinking_tokens == body + marks
    assert not whole.in_thought


def test_thinking_is_switched_off_by_the_template(lm: mm.LM) -> None:
    reply = ask(lm, "What is 2 + 2?", think=False)
    assert (reply.thinking, reply.text) == ("", ANSWER)
    assert reply.stats.thinking_tokens == 0
    assert ask(lm, "Hello", think=None).text == "Hi!"


@pytest.mark.parametrize("tokens", [0, 1, 7, 500])
@pytest.mark.parametrize("think", [None, True])
def test_a_thought_ends_at_its_budget_and_the_answer_follows(
    lm: mm.LM, tokens: int, think: bool
) -> None:
    reply = ask(lm, "What is 2 + 2?", think=think, think_tokens=tokens)
    assert reply.text == ANSWER
    assert THOUGHT.startswith(reply.thinking)
    assert len(reply.thinking) <= tokens
    assert (reply.thinking == THOUGHT) == (tokens == 500)
    [batched] = lm.generate_batch([QUESTION], max_tokens=None, think=think, think_tokens=tokens)
    assert (batched.text, batched.thinking) == (reply.text, reply.thinking)


def test_a_limit_within_a_thought_says_so(lm: mm.LM) -> None:
    reply = lm.generate([{"role": "user", "content": "endless"}], max_tokens=20, think=True)
    assert (reply.text, reply.finish_reason, reply.in_thought) == ("", "length", True)
    assert reply.thinking.startswith("on and on")


def test_stop_strings_end_the_answer_and_not_the_thought(lm: mm.LM) -> None:
    reply = ask(lm, "What is 2 + 2?", stop=["4", "**"])
    assert (reply.thinking, reply.text) == (THOUGHT, "It is ")


@pytest.mark.parametrize("think", [None, True, False])
def test_a_form_is_that_of_the_answer(lm: mm.LM, think: bool | None) -> None:
    grammar = grammar_of(lm.tokenizer, json_object=True)
    reply = ask(lm, "json", think=think, grammar=grammar)
    assert reply.thinking == ("" if think is False else "An object.")
    assert reply.text == '{"a": 1}'


def test_a_budget_and_a_form_together_close_an_endless_thought(lm: mm.LM) -> None:
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    grammar = grammar_of(lm.tokenizer, closed_schema=schema)
    reply = ask(lm, "endless", think=True, think_tokens=9, grammar=grammar)
    assert reply.thinking == "on and on"[: len(reply.thinking)]
    assert reply.text.replace(" ", "") == '{"a":1}'


def test_old_thoughts_are_left_to_the_template_and_the_cache_is_used(lm: mm.LM) -> None:
    chat = mm.Chat(lm, think=True)
    first = collect(chat.reply("What is 2 + 2?"))
    assert chat.messages[-1] == {
        "role": "assistant",
        "content": ANSWER,
        "reasoning_content": THOUGHT,
    }
    second = collect(chat.reply("A json"))
    assert (second.thinking, second.text) == ("An object.", '{"a": 1}')
    prompt = lm.chat_prompt(chat.messages[:-1], True)
    assert THOUGHT not in lm.tokenizer.decode(prompt.ids)
    assert second.stats.cached_tokens >= first.stats.prompt_tokens - 2  # up to the old thought


def test_messages_that_name_the_marks_are_no_thoughts(lm: mm.LM) -> None:
    prompt = lm.chat_prompt([{"role": "user", "content": "a <think>\n"}])
    assert not prompt.in_thought
    history = [*QUESTION, {"role": "assistant", "content": "x </think> <think>"}, *QUESTION]
    assert not lm.chat_prompt(history).in_thought


@pytest.mark.parametrize(
    ("think", "last", "end"),
    [
        (None, {"content": "It"}, "assistant\nIt"),
        (True, {"content": "It"}, "assistant\n<think>\n\n</think>\n\nIt"),
        (False, {"content": "It"}, "\n</think>\n\nIt"),
        (None, {"content": "It", "reasoning_content": "T"}, "<think>\nT\n</think>\n\nIt"),
        (True, {"content": "It", "reasoning_content": "T"}, "<think>\nT\n</think>\n\nIt"),
        (True, {"content": "", "reasoning_content": "T"}, "<think>\nT\n</think>\n\n"),
        (False, {"content": "It", "reasoning_content": "T"}, "\n</think>\n\nIt"),
    ],
)
def test_a_reply_that_is_continued_has_its_thought_before_it(
    lm: mm.LM, think: bool | None, last: dict[str, str], end: str
) -> None:
    messages = [*QUESTION, {"role": "assistant", **last}]
    prompt = chat_prompt(lm.tokenizer, messages, think=think, continues=True)
    text = lm.tokenizer.decode(prompt.ids, skip_special=False)
    assert text.endswith(end)
    assert text.count("<think>") == text.count("</think>") <= 1
    assert (prompt.in_thought, prompt.may_think) == (False, False)


def test_a_model_that_does_not_think_says_so(tiny: mm.LM) -> None:
    for options in ({"think": True}, {"think_tokens": 4}):
        with pytest.raises(InvalidArgumentError, match="does not think"):
            tiny.generate(QUESTION, max_tokens=2, **options)  # type: ignore[arg-type]
    assert tiny.generate(QUESTION, max_tokens=2, think=False).thinking == ""
    with pytest.raises(InvalidArgumentError, match="think goes with a list of messages"):
        tiny.generate("text", think=True)


def test_the_card_s_sampling_for_thoughts_is_taken_with_them(lm: mm.LM) -> None:
    other = mm.Sampling(temperature=0.9)
    lm.thinking_sampling = other
    try:
        assert lm.default_sampling(lm.chat_prompt(QUESTION, True)) == other
        for think in (None, False):
            assert lm.default_sampling(lm.chat_prompt(QUESTION, think)) == lm.sampling
    finally:
        lm.thinking_sampling = None


@pytest.mark.parametrize(
    ("variables", "said"),
    [({"enable_thinking": 1}, "true or false"), ({"nothing": 1}, "no variable 'nothing'"),
     ({"messages": []}, "no variable")],
)  # fmt: skip
def test_variables_of_the_template_are_checked(lm: mm.LM, variables: Any, said: str) -> None:
    with pytest.raises(mm.MiniCPMError, match=said):
        chat_prompt(lm.tokenizer, QUESTION, variables=variables)
    given = chat_prompt(lm.tokenizer, QUESTION, variables={"enable_thinking": True})
    assert given.ids == lm.chat_prompt(QUESTION, True).ids


@pytest.mark.parametrize("tokens", [None, 3, 100])
def test_marks_that_are_text_to_the_tokenizer_are_found_too(
    tokens: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As MiniCPM4.1's are."""
    special = [name for name in SPECIAL if "think" not in name]
    script = {"opens": "<think>\nhm <b\n</think>\n\nYes </think>", "open": "hm <b\n</think>\n\nYes"}
    folder = tmp_path_factory.mktemp("text") / "thinker"
    lm = scripted_lm(folder, script, special=special)
    assert lm.tokenizer.thinking
    assert not lm.tokenizer.thinking.is_by_token
    free = ask(lm, "opens")
    assert (free.thinking, free.text) == ("hm <b", "Yes </think>")
    reply = ask(lm, "open", think=True, think_tokens=tokens)
    assert reply.thinking == ("hm" if tokens == 3 else "hm <b")
    assert tokens == 3 or reply.text == "Yes"
    grammar = grammar_of(lm.tokenizer, closed_schema={"const": {"a": 1}})
    held = ask(lm, "open", think=True, think_tokens=5, grammar=grammar)
    assert held.thinking == "hm <b"
    assert json.loads(held.text) == {"a": 1}


TEXT_FORM = ThinkingForm(opening="<think>", closing="</think>")
PARTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "</", "think>", "\n", "a", "b c", " ", "<think"]),
    max_size=8,
).map("".join)


@settings(max_examples=1000)
@given(text=PARTS, is_open=st.booleans(), cuts=st.sets(st.integers(0, 40)))
def test_marks_of_text_are_found_however_it_is_cut(
    text: str, is_open: bool, cuts: set[int]
) -> None:
    def read(pieces: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
        reader = ThoughtReader(TEXT_FORM, is_open=is_open)
        parts = [reader.add(piece) for piece in pieces] + [reader.finish()]
        return "".join(t for t, _ in parts), "".join(a for _, a in parts), parts

    thought, answer, _ = read([text] if text else [])
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    cut = [text[a:b] for a, b in pairwise(edges) if a < b]
    assert read(cut)[:2] == (thought, answer)
    assert read(list(text))[:2] == (thought, answer)
    begun = text.lstrip()
    if not is_open and not begun.startswith("<think>"):
        assert (thought, answer) == ("", text)
    else:
        body = text if is_open else begun.removeprefix("<think>")
        before, mark, after = body.partition("</think>")
        assert answer == (after.lstrip() if mark else "")
        if mark:
            assert thought == before.strip()
        shown = ""
        for piece, _ in read(cut)[2]:  # never half a mark
            shown += piece
            assert thought.startswith(shown)


TOKENS = st.lists(
    st.sampled_from(["<think>", "</think>", "a", "é", "\n", " ", "<", "<|im_start|>", "x"]),
    max_size=12,
)


@settings(max_examples=500)
@given(tokens=TOKENS, is_open=st.booleans())
def test_marks_of_tokens_split_a_reply(lm: mm.LM, tokens: list[str], is_open: bool) -> None:
    """Against a plain reading of the list of tokens."""
    form = lm.tokenizer.thinking
    assert form
    assert form.is_by_token
    ids = [i for name in tokens for i in lm.tokenizer.encode(name, add_bos=False)]
    transcript = Transcript(lm.tokenizer, [], thinking=form, in_thought=is_open)
    pieces = [transcript.add(token) for token in ids]
    stats = Stats.measure(prompt_tokens=1, cached_tokens=0, completion_tokens=1, start=0, first=0)
    reply = collect([*pieces, transcript.finish(stats)])
    inside, edge = is_open, is_open
    thoughts, answers = [""], ""
    for name in tokens:
        if name in ("<think>", "</think>"):
            if inside is (name == "<think>"):
                continue
            inside, edge = not inside, True
            thoughts += [""] * inside
            if inside and not answers.strip():
                answers = ""
            continue
        text = "" if name == "<|im_start|>" else name
        if edge:
            text = text.lstrip()
            edge = not text
        if inside:
            thoughts[-1] += text
        else:
            answers += text
    assert reply.thinking == "".join(thought.rstrip() for thought in thoughts)
    assert reply.text == answers
    assert reply.in_thought is inside
