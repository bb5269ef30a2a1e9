"""Tokenizers through GGUF's metadata and back: the same ids, for every kind of text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

import minicpm_mlx as mm
from minicpm_mlx.errors import TokenizerError
from minicpm_mlx.weights.gguf import convert_gguf
from minicpm_mlx.weights.gguf.header import GgufFile, read_header
from minicpm_mlx.weights.gguf.tokenizer import tokenizer_keys, write_tokenizer
from support.data import need_shared
from support.gguf_files import TEXTS, VOCABULARIES, byte_tokenizer, tensors, write, written

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye </s>, <|im_end|>"},
]


def in_memory(keys: dict[str, Any], architecture: str = "llama") -> GgufFile:
    metadata = {"general.architecture": architecture, **keys}
    return GgufFile(path=Path("m.gguf"), metadata=metadata, tensors={})


def through_gguf(source: Path, folder: Path, vocabulary: int) -> mm.Tokenizer:
    write_tokenizer(in_memory(tokenizer_keys(source, vocabulary), "minicpm"), folder)
    return mm.load_tokenizer(folder)


@pytest.mark.parametrize(
    "name",
    [
        "minicpm-1b",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in VOCABULARIES
            if name != "minicpm-1b"
        ),
    ],
)
def test_the_family_s_tokenizers_survive(name: str, tmp_path: Path) -> None:
    source = need_shared("tokenizers", name)
    folder = tmp_path / "back"
    folder.mkdir()
    convert_gguf(written(source, tmp_path), folder)
    before, after = mm.load_tokenizer(source), mm.load_tokenizer(folder)
    assert [after.encode(text) for text in TEXTS] == [before.encode(text) for text in TEXTS]
    assert (after.bos_id, after.adds_bos) == (before.bos_id, before.adds_bos)
    if name != "minicpm-1b":  # which is a bare tokenizer.json
        assert after.eos_ids == before.eos_ids
        assert after.chat_ids(MESSAGES) == before.chat_ids(MESSAGES)
    ids = after.encode(TEXTS[3] + TEXTS[4])
    assert after.decode(ids) == before.decode(ids)


@pytest.mark.slow
def test_a_tokenizer_model_alone_gives_the_same_metadata(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(need_shared("tokenizers", "minicpm-2b"), source)
    whole = tokenizer_keys(source, 122753)
    (source / "tokenizer.json").unlink()
    assert tokenizer_keys(source, 122753) == whole


@pytest.mark.slow
def test_the_file_llama_cpp_s_converter_makes_is_read_as_the_model_s_tokenizer(
    tmp_path: Path,
) -> None:
    """It writes SentencePiece's own scores, and "user defined" for pieces that are ordinary to
    tokenizer.json; and no template."""
    from sentencepiece import SentencePieceProcessor

    source = need_shared("tokenizers", "minicpm-2b")
    pieces = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    ids = range(len(pieces))
    scores = [pieces.get_score(i) for i in ids]

    def kind(i: int) -> int:
        if pieces.is_unknown(i) or pieces.is_control(i) or pieces.is_byte(i):
            return 2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6
        return 4 if scores[i] == 0 and i < 1345 else 1

    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [pieces.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    write_tokenizer(in_memory(keys, "minicpm"), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "minicpm"}))
    found, wanted = mm.load_tokenizer(tmp_path), mm.load_tokenizer(source)
    assert [found.encode(text) for text in TEXTS] == [wanted.encode(text) for text in TEXTS]
    assert found.chat_ids(MESSAGES) == wanted.chat_ids(MESSAGES)
    assert found.eos_ids == (2,)


def saved(folder: Path, **changes: Any) -> Path:
    tokenizer = byte_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(*patterns: str) -> Any:
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, bytes_alone])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt-2", {}),
        (
            "smollm",
            {
                "pre_tokenizer": pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Digits(individual_digits=True),
                        pre_tokenizers.ByteLevel(add_prefix_space=False),
                    ]
                )
            },
        ),
        ("qwen2", {"pre_tokenizer": split(WORDS + REST), "normalizer": normalizers.NFC()}),
    ],
)
def test_byte_level_tokenizers_survive(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = saved(tmp_path / "source", **changes)
    keys = tokenizer_keys(source, 300)
    assert keys["tokenizer.ggml.pre"] == name
    (tmp_path / "back").mkdir()
    before, after = mm.load_tokenizer(source), through_gguf(source, tmp_path / "back", 300)
    assert [after.encode(text) for text in TEXTS] == [before.encode(text) for text in TEXTS]
    assert after.vocab_size == before.vocab_size == 260


@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("llama-bpe", [f"{WORDS}{{1,3}}{REST}"]),
        ("minicpm5", [r"\p{N}{1,3}", f"{WORDS}+{REST}"]),
    ],
)
def test_whole_words_that_are_tokens_are_taken(
    name: str, patterns: list[str], tmp_path: Path
) -> None:
    source = saved(tmp_path / "source", pre_tokenizer=split(*patterns))
    spec = json.loads((source / "tokenizer.json").read_text())
    spec["model"]["ignore_merges"] = True
    spec["model"]["vocab"]["abc"] = 260
    (source / "tokenizer.json").write_text(json.dumps(spec))
    assert tokenizer_keys(source, 300)["tokenizer.ggml.pre"] == name
    (tmp_path / "back").mkdir()
    back, own = through_gguf(source, tmp_path / "back", 300), mm.load_tokenizer(source)
    assert back.encode("abc") == [260]
    assert [back.encode(text) for text in TEXTS] == [own.encode(text) for text in TEXTS]


def merging_across_words() -> Backend:
    """MiniCPM5's kind, with merges of all that stands side by side: each split shows in the ids."""
    tokenizer = Backend(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = split()
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|im_end|>", "<think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=letters, special_tokens=special, show_progress=False
    )
    lines = ["".join(PIECES[i::n] * 2) for n in range(1, 9) for i in range(n)]
    tokenizer.train_from_iterator([*TEXTS, *lines], trainer)
    tokenizer.pre_tokenizer = split(r"\p{N}{1,3}", f"{WORDS}+{REST}")
    return tokenizer


PIECES = [
    *(
        "你好",
        "世界",
        "，",
        "。",
        "𠮷",
        "한국",
        "１２",
        "0",
        "12345",
        "²½Ⅷ",
        "٣",
        "🙂",
        "👩‍👩‍👧",
        "🇨🇳",
    ),
    *(
        "e\u0301",
        "\u0308",
        "\u0e34",
        "\ufe0f",
        "\u200d",
        "'s",
        "'LL",
        "'ve",
        "’t",
        "'",
        "abc",
        " The",
    ),
    *(" ", "  ", "\n", "\r\n", "\t", "\u3000", "\xa0", "\u2028", "\x85", "\x00", "\x1b", "\x7f"),
    *("...", "<", "&", "_", "=", "<think>", "$"),
]


def test_minicpm5_s_splits_are_those_of_tokenizers_for_any_text(tmp_path: Path) -> None:
    own = merging_across_words()
    source = saved(tmp_path / "source")
    (source / "tokenizer.json").write_text(own.to_str())
    keys = tokenizer_keys(source, own.get_vocab_size())
    assert keys.pop("tokenizer.ggml.pre") == "minicpm5"
    del keys["tokenizer.ggml.add_bos_token"]  # without it llama.cpp adds none here
    file = in_memory({"tokenizer.ggml.pre": "minicpm5", **keys})
    write_tokenizer(file, made := tmp_path)
    of_json, of_gguf = mm.load_tokenizer(source), mm.load_tokenizer(made)

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join))
    def equal(text: str) -> None:
        ids = own.encode(text, add_special_tokens=False).ids
        assert of_json.encode(text) == of_gguf.encode(text) == ids

    equal()


def test_a_split_without_a_name_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", pre_tokenizer=split(r"\s+|\S"))
    with pytest.raises(TokenizerError, match=r"has no name in GGUF.*gpt-2"):
        tokenizer_keys(source, 300)


def test_a_tokenizer_without_merges_is_refused_as_llama_cpp_does(tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    spec = json.loads((source / "tokenizer.json").read_text())
    spec["model"]["merges"] = []
    (source / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match="it has no merges"):
        tokenizer_keys(source, 300)


def test_a_normalizer_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", normalizer=normalizers.Lowercase())
    with pytest.raises(TokenizerError, match="normalises texts by Lowercase"):
        tokenizer_keys(source, 300)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="the model 200"):
        tokenizer_keys(saved(tmp_path / "source"), 200)


def test_tokens_that_the_model_does_not_know_are_left_out(tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    (source / "added_tokens.json").write_text(json.dumps({"<call>": 260, "<answer>": 261}))
    keys = tokenizer_keys(source, 261)
    assert (len(keys["tokenizer.ggml.tokens"]), keys["tokenizer.ggml.tokens"][-1]) == (
        261,
        "<call>",
    )


def test_the_tokens_that_a_template_names_survive(tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    stated = {"pad_token": "</s>", "chat_template": "{{ pad_token }}|{{ sep_token }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(stated))
    folder = tmp_path / "back"
    folder.mkdir()
    tokenizer = through_gguf(source, folder, 260)
    assert tokenizer.chat_text(MESSAGES) == "</s>|"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "model must be gpt2 or llama, got bert"),
        ({"model": 3}, "model must be of type str"),
        ({"pre": "falcon"}, r"model.gguf: tokenizer.ggml.pre is falcon; expected gpt-2.* minicpm5"),
        ({"tokens": ["a", "a"]}, "all different"),
        ({"tokens": [1, 2]}, "a list of str"),
        ({"token_type": [1]}, "must be 270 numbers, got 1"),
        ({"merges": ["x"]}, "damaged vocabulary"),
        ({"merges": ["zz qq"]}, "damaged vocabulary"),
        ({"eos_token_id": 10**6}, "eos_token_id must be below"),
        ({"add_bos_token": 1}, "add_bos_token must be of type bool"),
        ({"model": "llama", "scores": [0.5]}, "scores must be"),
        (
            {"model": "llama", "tokens": ["a", "b" * 2000], "token_type": [1, 1]}
            | {"scores": [0.0, 0.5], "eos_token_id": 1},
            "at most 1024 characters each, got 2000",
        ),
    ],
)
def test_a_damaged_vocabulary_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    keys = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    file = read_header(write(tmp_path / "model.gguf", tensors(), keys=keys))
    with pytest.raises(TokenizerError, match=message) as caught:
        write_tokenizer(file, tmp_path)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "tokenizer.json").exists()
