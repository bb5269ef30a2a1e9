"""Whole data sets: what is made of them, how it is counted, and every fault with its place."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minicpm_mlx.errors import DataError, InvalidArgumentError
from minicpm_mlx.text.tokenizer import Tokenizer, load_tokenizer
from minicpm_mlx.train.data.batches import length
from minicpm_mlx.train.data.counts import Counts, note_context
from minicpm_mlx.train.data.dataset import Data, DataOptions, load_data
from minicpm_mlx.train.data.encoding import Encoder
from minicpm_mlx.train.data.examples import ReplyPrompt
from minicpm_mlx.train.data.layouts import recognise
from minicpm_mlx.train.data.samples import Labelled, Pair, Sample
from support.data import need_shared
from support.tiny_tokenizer import tiny

ASK = {"role": "user", "content": "a"}
REPLY = {"role": "assistant", "content": "b"}
GOOD = {"messages": [ASK, REPLY]}
PAIRS = "preference pairs ({}, chosen, rejected)"


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def written(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@functools.cache
def minicpm() -> Tokenizer:
    return load_tokenizer(need_shared("tokenizers", "minicpm-2b"))


@functools.cache
def openbmb(name: str) -> Data:
    return load_data(need_shared("finetune", name), minicpm())


def loaded(path: Path, **options: Any) -> Data:
    return load_data(path, tiny(), DataOptions(**options))


# OpenBMB's own samples


@pytest.mark.parametrize(
    ("name", "layout", "kind", "samples"),
    [
        ("alpaca_array", "Alpaca", Sample, (160, 20, 20)),
        ("alpaca_zh_array", "Alpaca", Sample, (160, 20, 0)),
        ("messages_array/AdvertiseGenChatML", "chat messages", Sample, (9, 3, 0)),
        ("messages_array/ocnli_public_chatml", "chat messages", Sample, (13, 13, 0)),
        ("messages_jsonl", "chat messages", Sample, (160, 20, 20)),
        ("prompt_completion", "prompt and completion", Sample, (160, 20, 20)),
        ("sharegpt", "ShareGPT", Sample, (160, 20, 20)),
        ("text", "plain text", Sample, (160, 20, 20)),
        ("plain_text", "plain text", Sample, (14, 2, 0)),
        ("kto_messages_label", "chat messages with label (KTO)", Labelled, (54, 6, 0)),
        ("preference_llama_factory_sharegpt", PAIRS.format("conversations"), Pair, (60, 20, 0)),
        ("preference_messages_jsonl", PAIRS.format("prompt"), Pair, (60, 20, 0)),
        ("preference_strings_jsonl", PAIRS.format("prompt"), Pair, (54, 6, 0)),
    ],
)
def test_every_layout_of_openbmb_is_read_whole(
    name: str, layout: str, kind: type, samples: tuple[int, int, int]
) -> None:
    data = openbmb(name)
    assert data.format == layout
    assert (len(data.train), len(data.valid), len(data.test)) == samples
    assert all(type(item) is kind for item in [*data.train, *data.valid, *data.test])
    assert all(count.bad == count.dropped == count.truncated == 0 for count in data.counts.values())
    assert len(data.prompts) == min(4, samples[1])


def test_one_conversation_in_three_layouts_is_one_training_set() -> None:
    chat, pairs, sharegpt = map(openbmb, ("messages_jsonl", "prompt_completion", "sharegpt"))
    assert chat.train == pairs.train == sharegpt.train
    assert chat.prompts == pairs.prompts == sharegpt.prompts


def asked(text: str) -> ReplyPrompt:
    return ReplyPrompt([{"role": "user", "content": text}])


# Counts


def test_nothing_is_left_out_in_silence(tmp_path: Path) -> None:
    long = {"messages": [ASK, {"role": "assistant", "content": "c" * 60}]}
    lost = {"messages": [{"role": "user", "content": "c" * 60}, REPLY]}
    path = written(tmp_path, "a.jsonl", lines(GOOD, long, {"messages": []}, lost, GOOD, long))
    data = loaded(path, max_seq_length=40, skip_bad=1, valid_fraction=0)
    sample = data.train[0]
    assert isinstance(sample, Sample)
    length = len(sample.ids)
    long_targets = data.train[1].targets if isinstance(data.train[1], Sample) else 0
    tokens, targets = 2 * length + 2 * 40, 2 * 2 + 2 * long_targets
    numbers = {"truncated": 2, "dropped": 1, "split": 0, "bad": 1}
    expected = Counts(rows=5, samples=4, tokens=tokens, targets=targets, **numbers)
    assert data.counts == {"train": expected}
    assert data.bad == (
        f"{path}:3: messages: expected at least one message, found none; remove the sample",
    )
    assert data.overlong == (
        f"{path}:2: {length + 59} tokens, truncated",
        f"{path}:4: {length + 59} tokens, dropped",
        f"{path}:6: {length + 59} tokens, truncated",
    )
    assert data.notes == (
        "no validation set, as valid_fraction is 0",
        "2 longer than 40 tokens and truncated; raise max_seq_length",
        "1 dropped, as longer than 40 tokens; raise max_seq_length",
        "1 bad and skipped",
    )


def test_names_of_special_tokens_in_rows_are_counted_and_listed(tmp_path: Path) -> None:
    def messages(reply: str) -> dict[str, Any]:
        return {"messages": [*GOOD["messages"][:-1], {"role": "assistant", "content": reply}]}

    talk = lines(messages("a</s>"), messages("<s>a</s>"), messages("a"))
    text = lines({"text": "a<|im_end|>"}, {"text": "b"})
    notes = loaded(written(tmp_path, "talk.jsonl", talk), valid_fraction=0).notes
    assert notes[1:] == (
        "names of special tokens in messages, which stay ordinary text: </s>, <s> (rows: 2)",
    )
    notes = loaded(written(tmp_path, "text.jsonl", text), valid_fraction=0).notes
    assert notes[1:] == (
        "special tokens in plain text, which are read as tokens: <|im_end|> (rows: 1)",
    )


def test_fields_that_are_not_read_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", lines(GOOD) + json.dumps({**GOOD, "id": 1, "\ud800": 2}))
    known = r"\(chat_template_kwargs, functions, messages, tools\)"
    with pytest.raises(DataError, match=rf"a.jsonl:2: id, '\\ud800': .* {known}") as caught:
        loaded(path)
    assert str(caught.value).endswith("--ignore-columns id,'\\ud800'")
    with pytest.raises(DataError, match=r"2: '\\ud800': .* --ignore-columns id,'\\ud800'$"):
        loaded(path, ignore_columns=("id",))
    notes = loaded(path, ignore_columns=("id", "\ud800")).notes
    assert "fields left unread: id, '\\ud800'" in notes
    for name in ("messages", "source"):
        with pytest.raises(InvalidArgumentError, match=f"ignore_columns .*'{name}' is read, or no"):
            loaded(path, ignore_columns=("id", "\ud800", name))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "tool": []} | {"tool": [{"name": "f"}]}, r"tool \(tools\?\): .* tools\), found"),
        (
            {"messages": [GOOD["messages"][0], {**GOOD["messages"][-1], "reasonning": "t"}]},
            r"messages.reasonning \(reasoning\?\): .* role, thinking, tool_calls, ",
        ),
        (
            {**GOOD, "tools": json.dumps([{"name": "f", "parameter": {"type": "object"}}])},
            r"tools.parameter \(parameters\?\): .* \(description, name, parameters, strict, type",
        ),
        (
            {**GOOD, "tools": [{"function": {"name": "f", "returns": {"type": "string"}}}]},
            "tools.function.returns: ",
        ),
    ],
)
def test_a_misspelt_field_is_an_error_that_names_what_is_read(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = written(tmp_path, "a.jsonl", lines(row))
    with pytest.raises(DataError, match=f"a.jsonl:1: {message}"):
        loaded(path)


def test_samples_that_are_both_trained_and_validated_on_are_noted(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        written(tmp_path, f"{name}.jsonl", numbered({"train": 20, "valid": 3, "test": 30}[name]))
    assert [
        note.partition(" set are in the training set too")[0] for note in loaded(tmp_path).notes
    ] == [
        "3 of 3 samples of the valid",
        "20 of 30 samples of the test",
    ]
    twice = written(tmp_path, "twice.jsonl", lines(*[GOOD] * 20))
    assert any("2 of 2 samples of the valid set" in note for note in loaded(twice).notes)


def test_samples_longer_than_the_context_are_noted(tmp_path: Path) -> None:
    data = loaded(written(tmp_path, "a.jsonl", lines(GOOD, GOOD)), valid_fraction=0)
    tokens = length(data.train[0])
    assert note_context(data.train, tokens) == []
    (note,) = note_context(data.train, tokens - 1)
    assert f"2 samples are longer than the model's context of {tokens - 1} tokens" in note


def test_hashes_are_of_each_file(tmp_path: Path) -> None:
    for name in ("train.jsonl", "valid.jsonl"):
        written(tmp_path, name, lines(GOOD))
    first = loaded(tmp_path).sha256
    written(tmp_path, "train.jsonl", lines(GOOD) + "\n")
    second = loaded(tmp_path).sha256
    assert first["train.jsonl"] != second["train.jsonl"]
    assert first["valid.jsonl"] == second["valid.jsonl"]


def test_progress_is_told_of_rows(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", lines(*[GOOD] * 2001))
    told: list[int] = []
    load_data(path, tiny(), progress=told.append)
    assert told == [1000, 2000]


# The validation set


def numbered(count: int) -> str:
    return lines(*({"prompt": f"a{i}", "completion": f"b{i}"} for i in range(count)))


def test_a_validation_set_is_drawn_by_seed_and_shares_no_row(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", numbered(50))
    one, again, other = loaded(path), loaded(path), loaded(path, seed=1)
    assert (len(one.train), len(one.valid)) == (45, 5)
    assert one == again
    assert one.valid != other.valid
    assert not any(item in one.train for item in one.valid)
    everything = loaded(path, valid_fraction=0)
    assert sorted(map(str, one.train + one.valid)) == sorted(map(str, everything.train))
    assert any("5 of 50 samples were held out as one, with seed 0" in note for note in one.notes)
    assert one.prompts[0] in [asked(f"a{i}") for i in range(50)]


@pytest.mark.parametrize(("rows", "held"), [(9, 0), (10, 1), (25, 2), (2500, 200)])
def test_a_validation_set_is_neither_empty_nor_large(tmp_path: Path, rows: int, held: int) -> None:
    data = loaded(written(tmp_path, "a.jsonl", numbered(rows)))
    assert (len(data.train), len(data.valid)) == (rows - held, held)
    assert ("valid" in data.counts) == bool(held)
    assert any("no validation set" in note for note in data.notes)


def test_one_s_own_validation_set_is_used_as_it_is(tmp_path: Path) -> None:
    written(tmp_path, "train.jsonl", numbered(50))
    written(tmp_path, "dev.csv", "prompt,completion\nq,r\n")
    data = loaded(tmp_path)
    assert (len(data.train), len(data.valid)) == (50, 1)
    assert data.prompts == (asked("q"),)
    assert data.notes == ()


def test_pieces_of_one_long_text_are_shared_out(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "abc\n\n" * 100)
    data = loaded(path, max_seq_length=21)
    assert len(data.valid) == round((len(data.train) + len(data.valid)) / 10)
    assert not any(item in data.train for item in data.valid[:-1] if len(data.valid) > 99)
    assert data.counts["train"].rows == 1
    assert isinstance(data.prompts[0], str)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip_bad": -1}, "skip_bad must be 0 or more, got -1"),
        ({"valid_fraction": 1}, "valid_fraction must be 0 or more and below 1, got 1"),
        ({"valid_fraction": float("nan")}, "valid_fraction must be 0 or more and below 1, got nan"),
        ({"seed": "x"}, "seed must be a whole number"),
    ],
)
def test_an_option_out_of_range_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        DataOptions(**options)


def test_bad_samples_past_those_allowed_are_an_error_that_lists_the_first(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", lines(GOOD, {}, [], GOOD, {"messages": 3}))
    assert loaded(path, skip_bad=3).counts["train"].bad == 3
    with pytest.raises(DataError, match="at most 2 bad samples, found more") as caught:
        loaded(path, skip_bad=2)
    for line in (2, 3, 5):
        assert f"{path}:{line}: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_samples_are_counted_over_all_files(tmp_path: Path) -> None:
    for name in ("train.jsonl", "valid.jsonl"):
        written(tmp_path, name, lines(GOOD, {}))
    data = loaded(tmp_path, skip_bad=2)
    assert {split: count.bad for split, count in data.counts.items()} == {"train": 1, "valid": 1}
    with pytest.raises(DataError, match="at most 1 bad"):
        loaded(tmp_path, skip_bad=1)


# Faults


LINE, KTO = json.dumps(GOOD), {**GOOD, "label": True}
DEEP = '{"a":' * 9000 + "1" + "}" * 9000


@pytest.mark.parametrize(
    ("name", "contents", "place", "message"),
    [
        ("a.jsonl", f"{LINE}\n{{'text': 'a'}}\n", ":2", "not JSON at character 2"),
        ("a.jsonl", f"{LINE}\n{LINE[:-9]}", ":2", "not JSON"),
        ("a.jsonl", f"{LINE} {{}}\n", ":1", "one object a line"),
        ("a.jsonl", f"{LINE},\n", ":1", "found ','"),
        ("a.jsonl", f"{LINE}\n3\n", ":2", "expected an object {…}, found a num"),
        ("a.jsonl", f"{LINE}\n[1]\n", ":2", "expected an object {…}, found a list"),
        ("a.jsonl", f"{LINE}\nnull\n", ":2", "found null"),
        ("a.jsonl", '{"text": NaN}\n', ":1", "JSON, which has no NaN"),
        ("a.jsonl", '{"text": "a", "text": "b"}\n', ":1", "found 'text' twice"),
        ("a.jsonl", f'{{"text": {"9" * 5000}}}\n', ":1", "one of 5000 digits"),
        ("a.jsonl", f"{DEEP}\n", ":1", "nested too deep"),
        ("a.json", "[" * 9000, ": item 1", "nested too deep (line 1)"),
        ("a.jsonl", '{"text": "a\x01"}\n', ":1", "invalid control char"),
        ("a.jsonl", f"{LINE}\n".encode() + b'{"a": "\xff"}', ":2", "byte 0xff at offset 7"),
        ("a.txt", "山东省".encode("gbk"), "", "expected UTF-8, found byte 0xb6 at offset 2"),
        ("a.jsonl", LINE.encode("utf-16"), "", "found UTF-16; save it as UTF-8"),
        ("a.jsonl", f"{LINE}\n\0\0\n", ":2", "found a NUL character at 0"),
        ("a.txt", b"PK\x03\x04\0\0", "", "found a NUL character at 4"),
        ("a.jsonl", "", "", "expected at least one sample, found none"),
        ("a.json", "[]", "", "expected at least one sample"),
        ("a.json", f"[{LINE}", ": item 2", "found the end; is the file w"),
        ("a.json", f"[{LINE}\n{{}}]", ": item 2", "line 2: expected a comma"),
        ("a.json", f"[{LINE},\n]", ": item 2", "found a comma before ]"),
        ("a.json", f"[{LINE}]\nx", ": item 2", "nothing after the list"),
        ("a.json", '[{"a" 1}]', ": item 1", "not JSON at line 1"),
        ("a.json", json.dumps(GOOD, indent=1), "", "an object over 12 lines; put [ and ] around"),
        ("a.jsonl", f"{json.dumps(GOOD, indent=2)}\n" * 3, "", "or write each on a line (jq -c)"),
        ("a.json", json.dumps({"text": "a"}, indent=0)[:-1], ":1", "not JSON at char"),
        (
            "a.json",
            json.dumps({"rows": [GOOD] * 3}, indent=1),
            "",
            "if it holds the list, write that alone",
        ),
        ("a.json", json.dumps({"rows": [GOOD] * 3}), ":1", "found a list of objects in rows; ma"),
        ("a.jsonl", lines(GOOD) + json.dumps(GOOD, indent=1), ":2", "not JSON at char"),
        ("a.jsonl", lines(GOOD, {"messages": [ASK]}), ":2", "as the last message"),
        ("a.jsonl", lines(GOOD, {"text": "a"}), ":2", "a.jsonl:1, found plain text"),
        ("a.jsonl", lines(KTO, GOOD), ":2", "(KTO) as in"),
        ("a.csv", "why?,so\nwho?,me\n", ":2", "found why?, so; rename the fields"),
        ("a.csv", "text\na\nb,c\n", ":3", "expected 1 cells as in the first"),
        ("a.csv", "text,text\na,b\n", ":1", "each once, found text, text"),
        ("a.csv", 'text\n"a\nb\n', ":2", "correct the quotes"),
        ("a.csv", b"text\na\n\xff\n", ":3", "byte 0xff at offset 0"),
        ("a.csv", "text\n", "", "at least one sample"),
        ("a.xlsx", "x", "", "found .xlsx; convert or rename it"),
        ("data", "x", "", "found no ending"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_data_is_one_line_that_names_the_place(
    tmp_path: Path, name: str, contents: bytes | str, place: str, message: str
) -> None:
    path = written(tmp_path, name, contents)
    with pytest.raises(DataError) as caught:
        loaded(path)
    text = str(caught.value)
    assert text.startswith(f"{path}{place}")
    assert message in text
    assert len(text) < 600
    assert text.isprintable()


def test_a_file_that_cannot_be_opened_or_has_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl: No such file or directory"):
        loaded(tmp_path / "none.jsonl")
    (tmp_path / "train.jsonl").mkdir()
    with pytest.raises(DataError, match=r"train.jsonl: Is a directory"):
        loaded(tmp_path)
    (tmp_path / "train.jsonl").rmdir()
    written(tmp_path, "train.jsonl", lines(GOOD))
    written(tmp_path, "valid.jsonl", lines({"text": "a"}))
    with pytest.raises(DataError, match=r"valid.jsonl:1: expected chat messages as in .*:1, found"):
        loaded(tmp_path)


def test_data_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", lines({"prompt": "c" * 90, "completion": "b"}))
    with pytest.raises(DataError, match=r"at most 50 tokens, found none \(the shortest has 1"):
        loaded(path, max_seq_length=50)
    written(tmp_path, "a.jsonl", "{}\n")
    with pytest.raises(DataError, match="found only 1 bad ones"):
        loaded(path, skip_bad=5)


# Anything at all

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(
        ["user", "assistant", "system", "human", "gpt", "text", "\ud800", ASK, REPLY]
    ),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text"]), inner
        )
    ),
    max_leaves=12,
)
NAMES = """messages conversations instruction input output system history prompt completion
response question answer query text chosen rejected label kto_tag tools id"""
FIELDS = st.sampled_from([*NAMES.split(), "a\nb", "\ud800"])


def refusal(call: Callable[[], object]) -> str:
    """What a DataError says, "" where there is none."""
    try:
        call()
    except DataError as error:
        return str(error)
    return ""


@given(st.dictionaries(FIELDS, VALUES, max_size=5))
@example({"a\nb": [{"role": "x"}]})
@settings(deadline=None, max_examples=150)
def test_any_row_is_read_or_refused_in_one_line(row: dict[str, Any]) -> None:
    message = refusal(lambda: recognise(row).read(row))
    if message:
        assert message.isprintable()
    else:
        assert Encoder(tiny(), max_seq_length=4000).encode(recognise(row).read(row)).items


@given(
    st.binary(max_size=60)
    | st.text(alphabet='[]{}",:text\\ \n', max_size=60).map(str.encode)
    | st.sampled_from([lines(GOOD).encode(), f"[{lines(GOOD)}]".encode()]),
    st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.txt"]),
    st.integers(0, 100),
)
@settings(deadline=None, max_examples=150)
def test_any_file_is_read_or_refused_in_one_line(data: bytes, name: str, cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), name, data[:cut])
        message = refusal(lambda: loaded(path, skip_bad=1))
        assert not message or message.startswith(folder)
        assert not message or message.isprintable()
