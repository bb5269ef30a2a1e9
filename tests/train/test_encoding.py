"""What is learned of an example, token by token, with every template of the family."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_mlx.errors import DataError, InvalidArgumentError, TemplateError
from minicpm_mlx.text.chat_template import CHATML
from minicpm_mlx.text.tokenizer import Tokenizer, load_tokenizer
from minicpm_mlx.train.data import encoding
from minicpm_mlx.train.data.encoding import Encoded, Encoder
from minicpm_mlx.train.data.examples import Conversation, Document, Judged, Preference
from minicpm_mlx.train.data.preview import spans
from minicpm_mlx.train.data.samples import Labelled, Pair, Sample
from support.data import need_shared
from support.tiny_tokenizer import tiny

Message = dict[str, str]

SYSTEM = {"role": "system", "content": "你是助手。"}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def reply(text: str) -> Message:
    return {"role": "assistant", "content": text}


TALK = [user("你好"), reply("你好！有什么可以帮你？"), user("1+1=?"), reply("等于 2。")]


@functools.cache
def real(name: str) -> Tokenizer:
    return load_tokenizer(need_shared("tokenizers", name))


def samples(tokenizer: Tokenizer, messages: list[Message], **options: Any) -> list[Sample]:
    found = Encoder(tokenizer, **options).encode(Conversation(messages)).items
    assert all(isinstance(item, Sample) for item in found)
    return [item for item in found if isinstance(item, Sample)]


def one(tokenizer: Tokenizer, messages: list[Message], **options: Any) -> Sample:
    (sample,) = samples(tokenizer, messages, **options)
    return sample


def counted(sample: Sample, tokenizer: Tokenizer) -> list[str]:
    return [text for text, counts in spans(sample, tokenizer) if counts]


def check_prompts(tokenizer: Tokenizer, found: list[Sample], messages: list[Message]) -> None:
    """Each reply follows, in one of the samples, the very ids that inference would feed."""
    for at, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.chat_ids(messages[:at])
            end = len(prompt)
            following = [sample for sample in found if sample.ids[:end] == prompt]
            assert any(sample.mask[end - 1 : end + 1] == [False, True] for sample in following)


# MiniCPM 1.0: no end mark of the template's


def test_minicpm_learns_replies_and_one_end() -> None:
    tokenizer = real("minicpm-2b")
    sample = one(tokenizer, [SYSTEM, *TALK])
    assert spans(sample, tokenizer) == [
        ("<s> 你是助手。<用户>你好<AI>", False),
        ("你好！有什么可以帮你？", True),
        ("<用户>1+1=?<AI>", False),
        ("等于 2。</s>", True),
    ]
    assert sample.ids.count(1) == 1
    assert sample.ids.count(2) == 1
    assert sample.ids[:-1] == tokenizer.chat_ids([SYSTEM, *TALK], add_generation_prompt=False)
    check_prompts(tokenizer, [sample], [SYSTEM, *TALK])


def test_a_prompt_has_the_ids_of_inference_token_for_token() -> None:
    """`<AI>` is 95396 … within a text, where OpenBMB's fine-tuning has 1786, which `chat` never
    feeds."""
    sample = one(real("minicpm-2b"), [user("Hello"), reply("你好")])
    assert sample.ids[:8] == [1, 1786, 4194, 95388, 15934, 95396, 10850, 95388]
    assert sample.ids[-1] == 2
    assert sample.mask == [False] * 8 + [True] * (len(sample.ids) - 8)


@pytest.mark.parametrize("name", ["minicpm-2b", "minicpm4"])
def test_a_special_tokens_name_in_a_row_stays_text_and_is_named(name: str) -> None:
    tokenizer = real(name)
    messages = [user("What is <s>?"), reply("The first token, as </s> is the last. </s>")]
    plain = [user("What is (s)?"), reply("The first token, as (/s) is the last. (/s)")]
    found = Encoder(tokenizer).encode(Conversation(messages))
    special = set(tokenizer.special_tokens.values())
    [sample], [other] = found.items, samples(tokenizer, plain)
    assert [i for i in sample.ids if i in special] == [i for i in other.ids if i in special]
    assert "".join(counted(sample, tokenizer)).startswith(messages[1]["content"])
    assert found.names == {"<s>", "</s>"}
    assert Encoder(tokenizer).encode(Document("a</s>b")).names == {"</s>"}
    assert not Encoder(tokenizer).encode(Conversation(plain)).names


def test_a_reply_that_would_merge_into_the_prompt_leaves_it_whole() -> None:
    tokenizer, merged = real("minicpm-2b"), 0
    for text in ("<html>", ">= 3", "><", "</p>", "=", "/", "> quote", ">>>"):
        messages = [user("x < y"), reply(text)]
        sample = one(tokenizer, messages)
        check_prompts(tokenizer, [sample], messages)
        assert counted(sample, tokenizer) == [f"{text}</s>"]
        assert tokenizer.decode(sample.ids) == f"<用户>x < y<AI>{text}"
        prompt = tokenizer.chat_ids(messages[:1])
        merged += tokenizer.chat_ids(messages)[: len(prompt)] != prompt
    assert merged  # or this would show nothing


# ChatML


def test_chatml_learns_each_reply_with_its_end_mark() -> None:
    tokenizer = real("minicpm4")
    sample = one(tokenizer, [SYSTEM, *TALK])
    # The spaces are this tokenizer's: it begins each text after a special token with one.
    assert spans(sample, tokenizer) == [
        (
            "<s><|im_start|> system\n你是助手。<|im_end|> \n<|im_start|> user\n你好<|im_end|> \n"
            "<|im_start|> assistant\n",
            False,
        ),
        ("你好！有什么可以帮你？<|im_end|>", True),
        (" \n<|im_start|> user\n1+1=?<|im_end|> \n<|im_start|> assistant\n", False),
        ("等于 2。<|im_end|>", True),
    ]
    assert sample.ids[0] == 1
    assert sample.ids.count(1) == 1
    check_prompts(tokenizer, [sample], [SYSTEM, *TALK])
    whole = tokenizer.chat_ids([SYSTEM, *TALK], add_generation_prompt=False)
    assert sample.ids == whole[: len(sample.ids)]
    assert tokenizer.decode(whole[len(sample.ids) :]).strip() == ""


def test_the_demo_s_own_template_is_followed_and_blanks_leave_the_prompt_whole(
    demo_folder: Path,
) -> None:
    tokenizer = load_tokenizer(demo_folder)
    for text in ("\nGood bye.", "\n\nxa", " xa", "\na", "  a"):
        for messages in [user("Hi"), reply(text)], [user("a"), reply("b"), user("Hi"), reply(text)]:
            sample = one(tokenizer, messages)
            check_prompts(tokenizer, [sample], messages)
            replies = [f"{message['content']}<|im_end|>" for message in messages[1::2]]
            assert counted(sample, tokenizer) == replies


# Other templates


def test_turns_that_later_prompts_write_otherwise_are_samples_of_their_own() -> None:
    """As with models that think, whose templates leave old thoughts out."""
    template = (
        "{% for m in messages %}"
        "{% set old = m.role == 'assistant' and not loop.last %}"
        "{{ '<' ~ (m.content[-1:] if old else m.content) ~ '>' }}"
        "{% endfor %}"
    )
    tokenizer = tiny(template)
    messages = [user("aa"), reply("bc"), user("a"), reply("cb")]
    found = samples(tokenizer, messages)
    # The prompt of the last reply is what inference has: its earlier reply is one letter.
    assert [spans(sample, tokenizer) for sample in found] == [
        [("<s> <aa>", False), ("<bc></s>", True)],
        [("<s> <aa><c><a>", False), ("<cb></s>", True)],
    ]


def test_a_generation_prompt_that_past_turns_lack_is_kept_at_training() -> None:
    template = (
        "{% for m in messages %}{{ '<' ~ m.content ~ '>' }}{% endfor %}"
        "{{ '(a)' if add_generation_prompt else '' }}"
    )
    tokenizer = tiny(template)
    sample = one(tokenizer, [user("b"), reply("c")])
    assert spans(sample, tokenizer) == [("<s> <b>(a)", False), ("c</s>", True)]


def test_a_reply_merged_with_the_turn_after_it_is_a_sample_of_its_own() -> None:
    tokenizer = tiny()
    messages = [user("a"), reply("b("), user("c"), reply("a")]
    found = samples(tokenizer, messages)
    assert [counted(sample, tokenizer) for sample in found] == [["b(</s>"], ["a</s>"]]
    check_prompts(tokenizer, found, messages)
    assert len(samples(tokenizer, [user("a"), reply("b)"), user("c"), reply("a")])) == 1


def test_a_template_that_refuses_says_so() -> None:
    with pytest.raises(TemplateError, match="no system"):
        samples(tiny("{{ raise_exception('no system') }}"), TALK)
    with pytest.raises(TemplateError, match="no chat template"):
        samples(tiny(None), TALK)


# Masks


def test_mask_last_learns_the_last_reply_alone_and_mask_all_all_but_the_first_token() -> None:
    for name, end in (("minicpm-2b", "</s>"), ("minicpm4", "<|im_end|>")):
        tokenizer = real(name)
        last, everything = (one(tokenizer, TALK, mask=mask) for mask in ("last", "all"))
        assert counted(last, tokenizer) == [f"等于 2。{end}"]
        assert everything.mask == [False] + [True] * (len(everything.ids) - 1)
        assert last.ids == everything.ids == one(tokenizer, TALK).ids


def test_replies_that_are_marked_are_read_and_not_learned() -> None:
    for name, end in (("minicpm-2b", "</s>"), ("minicpm4", "<|im_end|>")):
        tokenizer = real(name)
        for marked, learned in (({1}, f"等于 2。{end}"), ({3}, "你好！有什么可以帮你？")):
            (sample,) = encode(tokenizer, TALK, marked)
            assert sample.ids == one(tokenizer, TALK).ids
            shown = [learned if end in learned or name == "minicpm-2b" else learned + end]
            assert counted(sample, tokenizer) == shown
        with pytest.raises(DataError, match="expected a reply to learn, found it marked"):
            encode(tokenizer, TALK, {1, 3})
        with pytest.raises(DataError, match="found it marked"):
            encode(tokenizer, TALK, {3}, mask="last")
        with pytest.raises(DataError, match='as mask is "all", found replies that are marked'):
            encode(tokenizer, TALK, {1}, mask="all")


def encode(
    tokenizer: Tokenizer, messages: list[Message], marked: set[int], **options: Any
) -> list[Any]:
    return Encoder(tokenizer, **options).encode(Conversation(messages, frozenset(marked))).items


def test_marks_hold_in_each_piece_of_a_conversation_that_is_split() -> None:
    tokenizer = tiny()
    talk = [turn for n in range(6) for turn in (user("a" * 20), reply(f"({n}"))]
    found = encode(tokenizer, [SYSTEM, *talk], {2, 8, 10}, max_seq_length=90, overlong="split")
    learned = "".join("".join(counted(sample, tokenizer)) for sample in found)
    assert [n for n in range(6) if f"({n}" in learned] == [1, 2, 5]
    assert all(sample.targets for sample in found)
    cut = Encoder(tokenizer, max_seq_length=30).encode(Conversation(talk, frozenset({1})))
    assert (len(cut.items), cut.dropped) == (0, 1)  # what counts is beyond the limit


def test_a_pair_that_the_template_makes_equal_is_refused() -> None:
    pair = Preference([user("q")], reply("b"), reply(" b\n"))
    with pytest.raises(DataError, match=r"rejected: .* the template makes the same; remove"):
        Encoder(tiny()).encode(pair)  # whose template trims replies
    assert len(Encoder(tiny(CHATML)).encode(pair).items) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "some"}, "mask must be one of assistant, last, all, got 'some'"),
        ({"overlong": "cut"}, "overlong must be one of truncate, drop, split, got 'cut'"),
        ({"max_seq_length": 1}, "max_seq_length must be 2 or more, got 1"),
        ({"max_seq_length": 2.5}, "max_seq_length must be a whole number"),
        ({"mask": "last", "overlong": "split"}, "overlong split contradicts mask"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Encoder(tiny(), **options)


@pytest.mark.parametrize(
    ("example", "options"),
    [
        (Document("a"), {"mask": "last"}),
        (Judged(TALK, True), {"mask": "all"}),
        (Preference(TALK[:1], reply("a"), reply("b")), {"mask": "all"}),
        (Preference(TALK[:1], reply("a"), reply("b")), {"overlong": "split"}),
    ],
)
def test_options_that_mean_nothing_for_the_data_are_refused(
    example: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(InvalidArgumentError, match="is not for"):
        Encoder(tiny(), **options).encode(example)


# Plain text, pairs, labels


@pytest.mark.parametrize("name", ["minicpm-2b", "minicpm4"])
def test_all_of_a_text_counts_between_one_bos_and_one_eos(name: str) -> None:
    tokenizer = real(name)
    for text in ("山东\n\n泰山", "<用户>q<AI>a</s>"):
        (sample,) = Encoder(tokenizer).encode(Document(text)).items
        assert isinstance(sample, Sample)
        assert sample.ids == [*tokenizer.encode(text.removesuffix("</s>")), 2]
        assert sample.mask == [False] + [True] * (len(sample.ids) - 1)


@pytest.mark.parametrize("name", ["minicpm-2b", "minicpm4"])
@pytest.mark.parametrize("text", ["山东 a\n\n b\n c d\n" * 20, "无换行 words " * 40])
def test_a_text_in_blocks_says_what_the_whole_does(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = real(name)
    whole = Encoder(tokenizer).encode(Document(text)).items[0]
    monkeypatch.setattr(encoding, "BLOCK", 25)
    (sample,) = Encoder(tokenizer).encode(Document(text)).items
    assert isinstance(sample, Sample)
    assert isinstance(whole, Sample)
    assert tokenizer.decode(sample.ids) == text
    assert sample.mask == [False] + [True] * (len(sample.ids) - 1)
    assert len(whole.ids) <= len(sample.ids) <= len(whole.ids) + 2 * len(text) // 25


def test_a_pair_has_one_prompt_and_counts_its_replies() -> None:
    tokenizer = real("minicpm-2b")
    (pair,) = (
        Encoder(tokenizer).encode(Preference([user("谁？")], reply("我。"), reply("<b>"))).items
    )
    assert isinstance(pair, Pair)
    assert spans(pair.chosen, tokenizer) == [("<s> <用户>谁？<AI>", False), ("我。</s>", True)]
    assert spans(pair.rejected, tokenizer) == [("<s> <用户>谁？<AI>", False), ("<b></s>", True)]
    check_prompts(tokenizer, [pair.chosen], [user("谁？"), reply("我。")])
    check_prompts(tokenizer, [pair.rejected], [user("谁？"), reply("<b>")])


def test_a_judged_reply_counts_the_last_turn_alone() -> None:
    tokenizer = real("minicpm4")
    (item,) = Encoder(tokenizer).encode(Judged(TALK, False)).items
    assert isinstance(item, Labelled)
    assert not item.good
    assert counted(item.sample, tokenizer) == ["等于 2。<|im_end|>"]


# Too long


def test_a_conversation_that_is_cut_is_as_long_as_it_is_said_to_be() -> None:
    tokenizer = tiny()
    messages = [m for i in range(20) for m in (user("a" * i), reply("b"))]
    messages = [user("a"), reply("b"), *messages[2:]]
    whole = one(tokenizer, messages)
    found = Encoder(tokenizer, max_seq_length=100).encode(Conversation(messages))
    cut = Sample(whole.ids[:100], whole.mask[:100])
    assert found == Encoded([cut], truncated=1, length=len(whole.ids))


@pytest.mark.parametrize("overlong", [None, "truncate", "drop"])
def test_a_prompt_that_leaves_no_room_is_dropped_and_counted(overlong: str | None) -> None:
    encoder = Encoder(tiny(), max_seq_length=20, overlong=overlong)
    for example in (
        Conversation([user("a" * 50), reply("b")]),
        Judged([user("a" * 50), reply("b")], True),
        Preference([user("a" * 50)], reply("b"), reply("c")),
    ):
        found = encoder.encode(example)
        assert found.items == []
        assert (found.dropped, found.truncated) == (1, 0)
        assert found.length > 50


def test_a_pair_keeps_its_prompt_and_is_dropped_where_the_rest_is_the_same() -> None:
    encoder = Encoder(tiny(), max_seq_length=40)
    found = encoder.encode(Preference([user("a")], reply("b" * 50), reply("c")))
    (pair,) = found.items
    assert isinstance(pair, Pair)
    assert len(pair.chosen.ids) == 40
    assert pair.rejected.ids[-1] == 2
    assert (found.truncated, found.dropped) == (1, 0)
    same = encoder.encode(Preference([user("a")], reply("b" * 50), reply("b" * 51)))
    assert (same.items, same.dropped) == ([], 1)


def test_overlong_drop_leaves_out_what_is_too_long_and_nothing_else() -> None:
    encoder = Encoder(tiny(), max_seq_length=40, overlong="drop")
    assert encoder.encode(Conversation([user("a"), reply("b" * 50)])).dropped == 1
    assert encoder.encode(Preference([user("a")], reply("b" * 50), reply("c"))).dropped == 1
    assert encoder.encode(Document("a" * 50)).dropped == 1
    length = len(one(tiny(), [user("a"), reply("b")]).ids)
    exact = Encoder(tiny(), max_seq_length=length, overlong="drop")
    assert len(exact.encode(Conversation([user("a"), reply("b")])).items) == 1


@given(
    text=st.text(alphabet="abc(<>\n é", min_size=1, max_size=80).filter(str.strip),
    limit=st.integers(2, 30),
    adds_bos=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_pieces_of_a_text_count_each_token_once(text: str, limit: int, adds_bos: bool) -> None:
    tokenizer = tiny(adds_bos=adds_bos)
    whole = [*tokenizer.encode(text), 2]
    found = Encoder(tokenizer, max_seq_length=limit).encode(Document(text))
    learned: list[int] = []
    for piece in found.items:
        assert isinstance(piece, Sample)
        assert len(piece.ids) <= limit
        assert piece.mask == [False] + [True] * (len(piece.ids) - 1)
        assert piece.ids.count(1) == adds_bos
        assert adds_bos or piece.ids[0] == (learned or whole)[-1 if learned else 0]
        learned += piece.ids[1:]
    assert learned == whole[1:]
    assert found.split == (len(whole) > limit)


def test_a_long_conversation_is_split_between_turns() -> None:
    tokenizer = tiny(CHATML)
    messages = [SYSTEM]
    for letter in "abcabc":
        messages += [user(letter), reply(letter * 3)]
    size = len(one(tokenizer, [SYSTEM, *messages[1:5]]).ids)
    found = samples(tokenizer, messages, max_seq_length=size, overlong="split")
    assert [counted(sample, tokenizer) for sample in found] == [
        ["aaa<|im_end|>", "bbb<|im_end|>"],
        ["ccc<|im_end|>", "aaa<|im_end|>"],
        ["bbb<|im_end|>", "ccc<|im_end|>"],
    ]
    for number, sample in enumerate(found):
        turns = [SYSTEM, *messages[1 + 4 * number : 5 + 4 * number]]
        assert sample == one(tokenizer, turns)
    encoder = Encoder(tokenizer, max_seq_length=size, overlong="split")
    assert encoder.encode(Conversation(messages)).split


def test_a_turn_that_is_too_long_by_itself_is_cut_into_pieces_that_repeat_nothing() -> None:
    tokenizer = tiny()
    text = "abc" * 30
    messages = [user("a"), reply(text), user("b"), reply("c")]
    found = samples(tokenizer, messages, max_seq_length=50, overlong="split")
    assert all(len(sample.ids) <= 50 for sample in found)
    assert all(sample.ids.count(1) == 1 for sample in found)
    assert "".join("".join(counted(sample, tokenizer)) for sample in found) == f"{text}</s>c</s>"


# Any conversation

TURN = st.lists(
    st.text(alphabet="abc 山😀\n<>=(é", max_size=6)
    | st.sampled_from(["<用户>", "<AI>", "  ", "<s>", "</s>", "<|im_end|>", "<|im_start|>", "▁"]),
    min_size=1,
    max_size=4,
).map("".join)
SAID = TURN.filter(lambda text: bool(text.strip()))
TALKS = st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3).map(
    lambda pairs: [m for asked, said in pairs for m in (user(asked), reply(said))]
)
MARKS = ("<s>", "</s>", "<|im_end|>", "<|im_start|>")


@pytest.mark.parametrize("name", ["minicpm-2b", "minicpm4", "tiny"])
@given(messages=TALKS)
@settings(deadline=None, max_examples=40)
def test_any_conversation_keeps_its_prompts_and_its_text(
    name: str, messages: list[Message]
) -> None:
    tokenizer = tiny() if name == "tiny" else real(name)
    found = samples(tokenizer, messages, max_seq_length=10_000)
    check_prompts(tokenizer, found, messages)
    last = found[-1]
    whole = tokenizer.chat_text(messages, add_generation_prompt=False)
    assert all(sample.ids.count(1) == 1 for sample in found)
    assert all(sample.ids[-1] in tokenizer.eos_ids for sample in found)
    # What each sample says is what the template writes; this tokenizer's spaces aside.
    said = "".join(text for text, _ in spans(last, tokenizer))
    text = whole.replace(" ", "").replace("▁", "")
    assert said.replace(" ", "").strip() in (f"<s>{text}".strip(), f"<s>{text}</s>")


@pytest.mark.parametrize("name", ["minicpm-2b", "minicpm4", "tiny"])
@given(asked=SAID, said=SAID)
@settings(deadline=None, max_examples=40)
def test_what_counts_is_the_reply_and_its_end(name: str, asked: str, said: str) -> None:
    tokenizer = tiny() if name == "tiny" else real(name)
    for mark in (*MARKS, "▁"):  # which the tokenizer decodes as something else
        said = said.replace(mark, "a")
    sample = one(tokenizer, [user(asked), reply(said)], max_seq_length=10_000)
    end = "<|im_end|>" if name == "minicpm4" else "</s>"
    text = said if name == "minicpm4" else said.strip()
    assert "".join(counted(sample, tokenizer)) == text + end
