from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx.errors import ContextLengthError, InvalidArgumentError
from minicpm_mlx.lm.outputs import Stats, StopStrings, Transcript, collect
from minicpm_mlx.lm.sampling import sampling_with
from support.tiny_tokenizer import tiny as tiny_tokenizer

GREEDY = mm.Sampling()
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


STOPS = st.lists(st.text("ab<>x", min_size=1, max_size=4), max_size=3)


@given(text=st.text("ab<>x", max_size=30), stops=STOPS)
def test_stop_strings_cut_alike_however_the_text_arrives(text: str, stops: list[str]) -> None:
    """Before the stop string that is complete first; of two that end together, the longer."""
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    seen = text[: min(ends)] if ends else text
    wanted = seen[: min(seen.find(s) for s in stops if s in seen)] if ends else text
    for pieces in (list(text), [text], [text[:3], text[3:]]):
        scanner, got = StopStrings(stops), ""
        for piece in pieces:
            got += scanner.add(piece)
            assert wanted.startswith(got)
            if scanner.found:
                break
        assert got + ("" if scanner.found else scanner.finish()) == wanted


@pytest.mark.parametrize(
    ("stop", "text", "count"),
    [
        ("<|im_end|>", "ab<", 2),  # as the model's own end, it is not counted
        ("<<|im_end|>", "ab", 3),
        ("b<<|im_end|>c", "a", 4),
        ("<|im_end|>c", "ab<", 4),
        ("<|im_end|>a", "ab<cb", 5),
        ("</s>", "ab<cb", 5),
        ("<c", "ab", 4),
        ("im", "ab<cb", 5),
    ],
)
def test_stop_strings_find_the_special_tokens_that_they_name(
    stop: str, text: str, count: int
) -> None:
    tokenizer = tiny_tokenizer()
    end = tokenizer.special_tokens["<|im_end|>"]
    transcript, pieces = Transcript(tokenizer, [stop, "never"]), []
    for token in (274, 261, end, 268, 267):  # ab < c b
        pieces.append(transcript.add(token))
        if transcript.ended:
            break
    stats = Stats.measure(
        prompt_tokens=1, cached_tokens=0, completion_tokens=transcript.count, start=0, first=0
    )
    reply = collect([*pieces, transcript.finish(stats)])
    assert (reply.text, len(reply.token_ids)) == (text, count)
    assert (transcript.stopped_by, reply.finish_reason) == (
        (stop, "stop") if transcript.ended else (None, "length")
    )


def test_the_first_space_is_dropped_unless_the_reply_began_before() -> None:
    tokenizer, word = tiny_tokenizer(), tiny_tokenizer().encode("a", add_bos=False)
    assert tokenizer.bytes_of(word[0]) == b" a"
    assert Transcript(tokenizer, []).add(word[0]).text == "a"
    assert Transcript(tokenizer, [], continues=True).add(word[0]).text == " a"


def test_a_stop_string_that_names_a_special_token_ends_every_kind_of_reply(demo: Any) -> None:
    """The demo is made to write <|im_start|>, which is no end of its own."""
    start = demo.tokenizer.special_tokens["<|im_start|>"]
    assert start not in demo.tokenizer.eos_ids
    forced = mm.Sampling(logit_bias={start: 100.0})
    options = {"max_tokens": 4, "sampling": forced}
    for speculate in (True, False):
        free = demo.generate("A", speculate=speculate, **options)
        assert (free.text, free.finish_reason) == ("", "length")
        held = demo.generate("A", speculate=speculate, stop=["<|im_start|>"], **options)
        assert (held.text, held.token_ids, held.finish_reason) == ("", (), "stop")
    [held] = demo.generate_batch(["A"], stop=["<|im_start|>"], **options)
    assert (held.token_ids, held.finish_reason) == ((), "stop")


def test_pieces_joined_are_the_completion(demo: Any) -> None:
    options = {"max_tokens": 24, "sampling": GREEDY}
    pieces = list(demo.stream(QUESTION, **options))
    whole = demo.generate(QUESTION, **options)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [i for piece in pieces for i in piece.token_ids] == list(whole.token_ids)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert demo.tokenizer.decode(whole.token_ids) == whole.text


def test_stats_count_what_happened(demo: Any) -> None:
    stats = demo.generate(QUESTION, max_tokens=24, sampling=GREEDY).stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.completion_tokens) == (37, 0, 7)
    assert 0 < stats.ttft < stats.seconds
    assert stats.prompt_tps > 0
    assert stats.decode_tps > 0
    assert stats.peak_memory > 100e6


def test_length_is_the_reason_when_the_limit_ends_it(tiny: Any) -> None:
    reply = tiny.generate(QUESTION, max_tokens=3, sampling=GREEDY)
    assert (reply.finish_reason, len(reply.token_ids)) == ("length", 3)


def test_stop_string_ends_the_text_before_it(demo: Any) -> None:
    reply = demo.generate(QUESTION, max_tokens=24, sampling=GREEDY, stop=["France"])
    assert (reply.text, reply.finish_reason) == ("The capital of ", "stop")


def test_text_and_ids_are_continued_messages_are_answered(demo: Any) -> None:
    text = "The capital of France is"
    continued = demo.generate(text, max_tokens=2, sampling=GREEDY)
    same = demo.generate(demo.tokenizer.encode(text), max_tokens=2, sampling=GREEDY)
    assert continued.text == same.text == " Paris."


def test_chat_returns_the_reply_and_the_history_for_the_next_turn(demo: Any) -> None:
    reply, history = demo.chat("What is the capital of France?", do_sample=False, max_tokens=24)
    assert reply == "The capital of France is Paris."
    assert history == [*QUESTION, {"role": "assistant", "content": reply}]
    again, longer = demo.chat("Repeat that.", history=history, do_sample=False, max_tokens=4)
    assert longer[:2] == history
    assert longer[3] == {"role": "assistant", "content": again}
    assert len(history) == 2  # the caller's list is the caller's


def test_chat_may_be_called_as_minicpm_calls_it(tiny: Any) -> None:
    sampling = {"temperature": 0.5, "top_p": 0.8, "repetition_penalty": 1.02, "seed": 1}
    ours, _ = tiny.chat("Name a colour.", max_tokens=8, **sampling)
    theirs, _ = tiny.chat(tiny.tokenizer, "Name a colour.", max_tokens=8, **sampling)
    assert ours == theirs


def test_chat_max_length_counts_the_prompt(demo: Any) -> None:
    prompt = len(demo.encode([{"role": "user", "content": "Tell me a story."}]))
    reply, _ = demo.chat("Tell me a story.", max_length=prompt + 5, do_sample=False)
    assert len(demo.tokenizer.encode(reply)) <= 5


def test_reply_ends_where_the_context_ends(demo: Any) -> None:
    small = replace(demo, card=replace(demo.card, context=40))
    reply = small.generate(QUESTION, max_tokens=50, sampling=GREEDY)
    assert (len(reply.token_ids), reply.finish_reason) == (3, "length")
    with pytest.raises(ContextLengthError, match="40 tokens and the context is 40"):
        small.stream([28] * 40)


def test_chat_turns_reuse_the_cache_and_say_the_same(demo: Any) -> None:
    chat = mm.Chat(demo, sampling=GREEDY, max_tokens=12)
    first = collect(chat.reply("What is the capital of France?"))
    second = collect(chat.reply("And of Italy?"))
    assert second.stats.cached_tokens >= first.stats.prompt_tokens
    alone = demo.generate(chat.messages[:-1], max_tokens=12, sampling=GREEDY)
    assert second.text == alone.text


def test_broken_off_reply_stays_in_the_conversation_as_far_as_it_came(tiny: Any) -> None:
    chat = mm.Chat(tiny, sampling=GREEDY, max_tokens=12)
    reply = chat.reply("Tell me a long story.")
    said = "".join(next(reply).text for _ in range(5))
    reply.close()
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    assert collect(chat.reply("Go on.")).text


def test_failed_turn_leaves_no_trace(demo: Any) -> None:
    chat = mm.Chat(demo, system="Be brief.")
    with pytest.raises(ContextLengthError, match="context is 8192"):
        collect(chat.reply("word " * 9000))
    assert chat.messages == []


def test_given_values_replace_the_models_own_and_none_does_not() -> None:
    base = mm.Sampling(temperature=0.5, top_p=0.8)
    assert sampling_with(base, temperature=None, top_k=5) == mm.Sampling(
        temperature=0.5, top_p=0.8, top_k=5
    )
    assert sampling_with(base, do_sample=False).temperature == 0
    with pytest.raises(InvalidArgumentError, match="unknown option 'temprature'"):
        sampling_with(base, temprature=1.0)


@pytest.mark.parametrize("wrong", [[1.5, 2.5], [b"x"], [None]])
def test_prompt_of_another_kind_is_refused(demo: Any, wrong: list[Any]) -> None:
    with pytest.raises(
        InvalidArgumentError, match="text, a list of token ids or a list of messages"
    ):
        demo.stream(wrong)


def test_chat_takes_the_reference_keywords_and_refuses_what_it_cannot_do(demo: Any) -> None:
    reply, _ = demo.chat(demo.tokenizer, query="Hi", history=None, num_beams=1, max_tokens=2)
    assert reply
    with pytest.raises(InvalidArgumentError, match="num_beams=4"):
        demo.chat("Hi", num_beams=4)
    with pytest.raises(InvalidArgumentError, match="max_length is 3; raise it"):
        demo.chat("Hi", max_length=3)
    with pytest.raises(InvalidArgumentError, match="one text to answer"):
        demo.chat(5)
