"""GGUF files that were damaged or made to do harm: a named error, at once, in little memory."""

from __future__ import annotations

import random
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx.errors import ConfigError, TokenizerError, WeightsError
from minicpm_mlx.weights.gguf import convert_gguf, read_gguf
from minicpm_mlx.weights.gguf.header import read_header
from support.damage import memory_grows_by_less_than
from support.gguf_files import SIZES, VOCAB, Type, byte_vocabulary, converted, tensors, write

LENGTHS = (0, 1, 5, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < 600
    return message


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words.encode())) + words.encode()


def file_of(
    *pairs: bytes, keys: int | None = None, infos: bytes = b"", tensors: int = 0, data: int = 0
) -> bytes:
    """A file of hand-made parts, whose counts may lie."""
    counts = struct.pack("<IQQ", 3, tensors, len(pairs) if keys is None else keys)
    head = b"GGUF" + counts + b"".join(pairs) + infos
    return head + bytes(-len(head) % 32 + data)


def info(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    shape = b"".join(struct.pack("<Q", size) for size in dims)
    return text(name) + struct.pack("<I", len(dims)) + shape + struct.pack("<IQ", kind, offset)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def test_a_missing_file_is_named(path: Path) -> None:
    assert "expected a readable weight file" in refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable GGUF file"),
        (b"GG", "not a readable GGUF file"),
        (b"GGUF", "not a readable GGUF file"),
        (b"PK\3\4" + b"\0" * 60, "not a readable GGUF file"),
        (b"GGUF" + b"\xff" * 60, "not a readable GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
        (b"GGUF" + struct.pack("<IQQ", 0x03000000, 0, 0), "of a big-endian machine"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "1;"),
    ],
)
def test_what_is_not_gguf_is_refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    assert message in refusal(path)


@pytest.mark.parametrize("share", [0.01, 0.03, 0.2, 0.5, 0.99])
def test_a_file_cut_short_is_refused(path: Path, share: float) -> None:
    whole = write(path, tensors(), Type.Q8_0).read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "not a readable GGUF file" in refusal(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (file_of(keys=2**63), "it ends too early"),
        (file_of(tensors=2**63), "it ends too early"),
        (file_of(struct.pack("<Q", 2**63) + b"key"), "it ends too early"),
        (file_of(pair("a", 8, struct.pack("<Q", 2**62))), "it ends too early"),
        (file_of(pair("a", 9, struct.pack("<IQ", 0, 2**60))), "it ends too early"),
        (file_of(pair("a", 9, struct.pack("<IQ", 12, 2**64 - 1))), "it ends too early"),
        (file_of(pair("a", 9, struct.pack("<IQ", 8, 2**60))), "it ends too early"),
        (file_of(pair("a", 9, struct.pack("<IQIQ", 9, 1, 9, 1))), "a value of the type 9"),
        (file_of(pair("a", 77, b"")), "a value of the type 77"),
        (file_of(pair("a", 7, b"\1"), pair("a", 7, b"\1")), "a is there twice"),
        (file_of(pair("a", 8, struct.pack("<Q", 1) + b"\xff")), "can't decode byte 0xff"),
        (file_of(infos=info("x", [2**63, 4]), tensors=1), "ends beyond the end"),
        (file_of(infos=info("x", [2**32] * 4), tensors=1), "ends beyond the end"),
        (file_of(infos=info("x", [0]), tensors=1), "expected whole blocks"),
        (file_of(infos=info("x", [33], 8), tensors=1), "expected whole blocks of 32"),
        (file_of(infos=info("x", [1] * 5), tensors=1), "5 dimensions"),
        (file_of(infos=info("x", []), tensors=1), "0 dimensions"),
        (file_of(infos=info("x", [4], 99), tensors=1), "unknown type 99"),
        (file_of(infos=info("x", [4], 0, 2**63), tensors=1), "ends beyond the end"),
        (file_of(infos=info("x", [4], 0, 2**64 - 32), tensors=1), "ends beyond the end"),
        (file_of(infos=info("x", [4], 0, 3), tensors=1, data=64), "a multiple of 32"),
        (file_of(infos=info("x", [4]) * 2, tensors=2, data=64), "x is there twice"),
        (file_of(infos=info("x", [4]) + info("y", [4]), tensors=2, data=64), "x and y overlap"),
        (file_of(pair("general.alignment", 4, struct.pack("<I", 0))), "expected a power of two"),
        (file_of(pair("general.alignment", 4, struct.pack("<I", 24))), "expected a power of two"),
        (file_of(pair("general.alignment", 6, struct.pack("<f", 2))), "expected a power of two"),
        (file_of(pair("general.alignment", 8, text("32"))), "expected a power of two"),
    ],
)
def test_lengths_that_lie_are_refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    start = time.perf_counter()
    assert message in refusal(path)
    assert time.perf_counter() - start < 1


@settings(deadline=None, max_examples=200)
@given(rest=st.binary(max_size=300))
def test_any_bytes_are_a_file_or_a_refusal(
    rest: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "x.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + rest)
    message = ""
    try:
        read_header(path)
    except WeightsError as error:
        message = str(error)
    assert message.isprintable()


def keys_of(architecture: str) -> list[str]:
    stated = [f"{architecture}.{key}" for key in SIZES] + list(byte_vocabulary())
    optional = ["rope.scaling.type", "rope.scaling.factor", "rope.freq_base", "expert_count"]
    optional += ["rope.dimension_count", "embedding_scale", "residual_scale", "logit_scale"]
    tokens = ["scores", "eot_token_id", "add_space_prefix", "unknown_token_id"]
    return [
        *stated,
        *(f"{architecture}.{key}" for key in optional),
        *(f"tokenizer.ggml.{key}" for key in tokens),
        "tokenizer.chat_template",
        "general.name",
        "general.alignment",
        "split.count",
    ]


@pytest.mark.parametrize("value", [0, 2**32 - 1, "x", [7]])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_values_of_another_type_are_refused_or_do_no_harm(
    model: str, value: Any, path: Path
) -> None:
    base = with_bytes() if model == "llama" else {}
    for key in keys_of("minicpm"):
        write(path, tensors(), architecture="minicpm", keys=base | {key: value})
        with suppress(WeightsError, ConfigError, TokenizerError):
            convert_gguf(path, path.parent)
            mm.Config.load(path.parent)
            mm.load_tokenizer(path.parent)


def mutated(whole: bytes, header: int, chance: random.Random) -> bytes:
    """A file with a few bytes changed, cut short, or with a length overwritten."""
    data = bytearray(whole)
    where = header if chance.random() < 0.9 else len(data)
    match chance.randrange(4):
        case 0:
            return bytes(data[: chance.randrange(len(data))])
        case 1:
            size = chance.choice([4, 8])
            at = chance.randrange(where - size)
            data[at : at + size] = (chance.choice(LENGTHS) % 256**size).to_bytes(size, "little")
        case _:
            for _ in range(chance.randrange(1, 5)):
                data[chance.randrange(where)] ^= 1 << chance.randrange(8)
    return bytes(data)


def with_bytes() -> dict[str, Any]:
    """A vocabulary of every byte, as a MiniCPM 4's would be scored."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "t", "h", "th"]
    tokens = [*pieces, *(f"[PAD{i}]" for i in range(len(pieces), VOCAB))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(VOCAB)],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 4 + [5] * (VOCAB - len(pieces)),
        "tokenizer.ggml.merges": None,
    }


BASES: dict[str, dict[str, Any]] = {
    "minicpm": {
        "minicpm.embedding_scale": 12.0,
        "minicpm.rope.scaling.type": "linear",
        "minicpm.rope.scaling.factor": 2.0,
        "tokenizer.chat_template": "{{ messages }}",
    },
    "llama": with_bytes(),
}


def attack(tmp_path: Path, architecture: str, seeds: range) -> int:
    """Convert mutated files; how many of them still were models."""
    path, folder = tmp_path / "small.gguf", tmp_path / "converted"
    folder.mkdir()
    kind = Type.Q8_0 if architecture == "minicpm" else Type.Q5_0
    keys = BASES[architecture]
    write(path, converted(tensors()), kind, architecture=architecture, keys=keys)
    convert_gguf(path, folder)
    whole = path.read_bytes()
    header = whole.index(read_header(path).tensors["token_embd.weight"].raw.tobytes())
    sound = 0
    for seed in seeds:
        path.write_bytes(mutated(whole, header, random.Random(seed)))
        start, message = time.perf_counter(), ""
        try:
            convert_gguf(path, folder)
            sound += 1
        except (WeightsError, ConfigError, TokenizerError) as error:
            message = str(error)
        assert message.isprintable(), seed
        assert time.perf_counter() - start < 1, seed
    return sound


@pytest.mark.parametrize("architecture", BASES)
@pytest.mark.parametrize("examples", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_files_are_models_or_refused(
    architecture: str, examples: int, tmp_path: Path
) -> None:
    with memory_grows_by_less_than(150 << 20):
        assert 0.05 < attack(tmp_path, architecture, range(examples)) / examples < 0.95
