"""The model class for lm-evaluation-harness, against plain forward passes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import minicpm_mlx as mm
from minicpm_mlx.errors import ContextLengthError, InvalidArgumentError, TemplateError
from minicpm_mlx.text.chat_template import Template
from support.harness import passed, prefixed
from support.scripted_model import scripted_lm
from support.tiny_model import write_model

PAIRS = [
    ("The capital of France is", " Paris"),
    ("1 2 3 4", " 5 6"),
    ("The capital of France is", " London, of course"),
    ("Q: 你好\nA: ", "世界"),
    ("", "Hello there"),
    ("The capital of France is", " Paris"),
    ("The capital of France", " is Paris"),
]
TEXT = "Once upon a time there was a small town by the sea, and in it lived a man with a boat."


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> mm.LM:
    return mm.load(write_model(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture
def ask(lm: mm.LM) -> Callable[..., Any]:
    """Wraps the tiny model for lm-eval."""
    pytest.importorskip("lm_eval")
    from minicpm_mlx.evals.harness.model import MiniCPM

    return lambda **options: MiniCPM(lm, **options)


def requests(*asked: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=args) for args in asked]


# Log likelihoods.


def test_log_likelihoods_are_those_of_plain_passes(lm: mm.LM, ask: Any) -> None:
    found = ask(width=3).loglikelihood(requests(*PAIRS))
    for (logprob, greedy), (context, continuation) in zip(found, PAIRS, strict=True):
        after = lm.tokenizer.encode(continuation)
        ids = [prefixed(lm), *after]
        if context:
            ids = lm.tokenizer.encode(context + continuation)
            # lm-eval counts a space at the end of the context with the continuation.
            after = ids[len(lm.tokenizer.encode(context.rstrip())) :]
        own, best = passed(lm, ids, len(after))
        assert logprob == pytest.approx(own, abs=1e-3)
        assert greedy == best
    ids = lm.tokenizer.encode("1 2 3 4")
    likeliest = lm.generate(ids, max_tokens=2, sampling=mm.Sampling()).token_ids
    assert ask()._loglikelihood_tokens([(None, ids, list(likeliest))])[0][1]


def test_a_context_that_is_too_long_loses_its_beginning_and_that_is_said(
    lm: mm.LM, ask: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = ask(max_length=12)
    ids = lm.tokenizer.encode(TEXT + " He sailed")
    count = len(ids) - len(lm.tokenizer.encode(TEXT))
    with caplog.at_level(logging.WARNING):
        [(logprob, _), _] = model.loglikelihood(requests((TEXT, " He sailed"), ("A", " B")))
    # The last token is not read: one more than 12 have to do with it.
    assert logprob == pytest.approx(passed(lm, ids[-13:], count)[0], abs=1e-3)
    assert abs(logprob - passed(lm, ids, count)[0]) > 0.01
    assert "1 of 2 contexts are longer than the model's 12 tokens" in caplog.text


def test_continuations_that_cannot_be_scored_are_refused(ask: Any) -> None:
    with pytest.raises(ContextLengthError, match=r"continuation has .* the context is 4"):
        ask(max_length=4).loglikelihood(requests(("A", TEXT)))
    with pytest.raises(InvalidArgumentError, match="empty text after 'A'"):
        ask().loglikelihood(requests(("A", "")))
    with pytest.raises(InvalidArgumentError, match="adds no token"):
        ask()._loglikelihood_tokens([(("a", "b"), [1], [])])


@pytest.mark.parametrize("length", [9, 200])
def test_whole_texts_are_scored_each_token_once(lm: mm.LM, ask: Any, length: int) -> None:
    [total, nothing] = ask(max_length=length).loglikelihood_rolling(requests((TEXT,), ("",)))
    ids = [prefixed(lm), *lm.tokenizer.encode(TEXT)]
    expected, place = 0.0, 1
    while place < len(ids):
        end = min(place + length, len(ids))
        # Each window has as many tokens before it as there is room for.
        expected += passed(lm, ids[max(end - length - 1, 0) : end], end - place)[0]
        place = end
    assert total == pytest.approx(expected, abs=1e-3)
    assert nothing == 0


# Replies.


def test_replies_end_where_the_task_says(lm: mm.LM, ask: Any) -> None:
    asked = [
        ("The capital of France is", {"until": ["\n", "."], "max_gen_toks": 7}),
        ("1 2 3 4", {"until": "7", "max_new_tokens": 6, "do_sample": False, "temperature": 0.0}),
        ("Once upon a time", {"max_gen_toks": 3, "until": [""], "num_beams": 1}),
    ]
    found = ask().generate_until(requests(*asked))
    expected = [
        lm.generate(prompt, max_tokens=tokens, stop=stop).text
        for (prompt, _), tokens, stop in zip(
            asked, (7, 6, 3), (["\n", "."], ["7"], []), strict=True
        )
    ]
    assert found == expected
    assert "7" not in found[1]


def test_a_prompt_that_leaves_no_room_for_the_reply_loses_its_beginning(
    lm: mm.LM, ask: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ids = lm.tokenizer.encode(TEXT)
    with caplog.at_level(logging.WARNING):
        [text] = ask(max_length=16).generate_until(requests((TEXT, {"max_gen_toks": 6})))
    assert text == lm.generate(ids[-10:], max_tokens=6).text
    assert "1 of 1 contexts" in caplog.text
    with pytest.raises(ContextLengthError, match="replies of 16 tokens and the context is 16"):
        ask(max_length=16).generate_until(requests((TEXT, {"max_gen_toks": 16})))


def test_drawn_replies_depend_on_seed_and_place_alone(ask: Any) -> None:
    how = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 4}
    same = requests(*[("Once upon a time", how)] * 2)
    first = ask(seed=1).generate_until(same)
    assert ask(seed=1, width=1).generate_until(same) == first
    assert len({*first}) > 1
    assert ask(seed=9).generate_until(same) != first


@pytest.mark.parametrize(
    ("options", "named"), [({"num_beams": 4}, "beam search"), ({"typical_p": 0.5}, "typical_p")]
)
def test_what_cannot_be_honoured_is_refused(ask: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named):
        ask().generate_until(requests(("A", options)))


# Conversations.

MESSAGES = [
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2 + 2?"},
]


def test_conversations_go_through_the_models_template(lm: mm.LM, ask: Any) -> None:
    model = ask()
    assert model.apply_chat_template(MESSAGES) == lm.tokenizer.chat_text(MESSAGES)
    assert model.chat_template(True) == lm.tokenizer.template.source
    assert model.chat_template(False) is None
    with pytest.raises(InvalidArgumentError, match="'tools'"):
        model.chat_template("tools")


@pytest.mark.parametrize("source", ["minicpm", "chatml"])
@pytest.mark.parametrize("begun", ["The answer is", "The answer is "])
def test_a_reply_that_is_begun_is_left_open(
    ask: Any, monkeypatch: pytest.MonkeyPatch, source: str, begun: str
) -> None:
    from minicpm_mlx.text.chat_template import BUILTIN

    model = ask()
    monkeypatch.setattr(model.lm.tokenizer, "template", Template(BUILTIN[source]))
    open_ended = [*MESSAGES, {"role": "assistant", "content": begun}]
    text = model.apply_chat_template(open_ended, add_generation_prompt=False)
    before = model.apply_chat_template(MESSAGES)
    # MiniCPM's own template strips what is said.
    assert text == before + (begun.rstrip() if source == "minicpm" else begun)


def test_a_template_without_system_messages_is_given_none(
    ask: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusing = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "[{{ m.content }}]{% endfor %}"
    )
    model = ask()
    monkeypatch.setattr(model.lm.tokenizer, "template", Template(refusing))
    with caplog.at_level(logging.WARNING):
        text = model.apply_chat_template([{"role": "system", "content": "Be brief."}, *MESSAGES])
    assert text == "[What is 1 + 1?][2][And 2 + 2?]"
    assert "no system message" in caplog.text
    monkeypatch.setattr(model.lm.tokenizer, "template", None)
    with pytest.raises(TemplateError, match="no chat template"):
        model.apply_chat_template([{"role": "system", "content": "Be brief."}])


@pytest.mark.parametrize("begun", [None, "It is <s> or"])
def test_names_of_special_tokens_stay_text_in_conversations(
    lm: mm.LM, ask: Any, begun: str | None
) -> None:
    model = ask()
    messages = [*MESSAGES, {"role": "user", "content": "What is </s>, and <s>?"}]
    if begun:
        messages.append({"role": "assistant", "content": begun})
    text = model.apply_chat_template(messages, add_generation_prompt=not begun)
    ids = model.tok_encode(text + " A </s>")
    assert lm.tokenizer.decode(ids, skip_special=False).endswith(f"{begun or ''} A </s>")
    plain = model.apply_chat_template(
        [{**m, "content": m["content"].translate({60: 40, 62: 41})} for m in messages],
        add_generation_prompt=not begun,
    )
    # All but the last, which is no message, stay text of as many bytes.
    assert len(ids) == len(model.tok_encode(plain + " A </s>"))


@pytest.mark.parametrize("think", [True, False, None])
def test_thoughts_are_no_part_of_the_replies_to_conversations(
    think: bool | None, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    from minicpm_mlx.evals.harness.model import MiniCPM

    reply = "<think>\nRed. Blue.\n</think>\n\nGreen. Red."
    lm = scripted_lm(tmp_path / "model", {"Which?": reply}, positions=512)
    model = MiniCPM(lm, think=think, think_tokens=64 if think else None)
    context = model.apply_chat_template([{"role": "user", "content": "Which?"}])
    asked = requests((context, {"until": ["Red"], "max_gen_toks": 60}))
    assert model.generate_until(asked) == ["Green. "]
    assert (model.get_model_info()["think"], model.get_model_info()["think_tokens"]) == (
        think,
        64 if think else None,
    )
    if think:
        with pytest.raises(InvalidArgumentError, match="think is for replies"):
            model.loglikelihood(requests((context, "Green")))
