"""What is said of a model that was published to attend sparsely to long texts."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from minicpm_mlx.memory import cache_bytes, dense_attention
from minicpm_mlx.model.config import Config
from support.data import GOLDEN
from support.tiny_model import write_model

LONG, SHORT = "a" * 40, "a"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    folder = write_model(tmp_path / "tiny")
    raw = json.loads((folder / "config.json").read_text())
    raw["sparse_config"] = {"kernel_size": 32, "topk": 64, "dense_len": 32}
    (folder / "config.json").write_text(json.dumps(raw))
    return str(folder)


@pytest.mark.parametrize(("prompt", "times"), [(SHORT, 0), (LONG, 1)])
def test_a_text_beyond_the_dense_length_is_said_to_be_dense_once(
    folder: str,
    prompt: str,
    times: int,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command("generate", "-m", folder, "-p", prompt, "--raw", "--max-tokens", "2")
    assert capsys.readouterr().err.count("sparse attention") == times


def test_a_chat_says_so_in_its_own_language_after_the_reply(
    folder: str,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("chat", "-m", folder, "--no-save", "--max-tokens", "2", "--plain")
    for language, words in (("en", "sparse attention"), ("zh", "稀疏注意力")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{LONG}\n{LONG}\n"))
        assert command(*options, "--lang", language) == 0
        out, err = capsys.readouterr()
        assert (out + err).count(words) == 1


def test_show_tells_what_it_costs(
    folder: str, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("show", folder, "--json") == 0
    cost = json.loads(capsys.readouterr().out)["dense_attention"]
    assert (cost["limit"], cost["context"], cost["times"]) == (32, 4096, 128)
    config, formats = Config.load(folder), (mx.bfloat16, mx.float32)
    assert cost["gigabytes"] in [4096 * cache_bytes(config, size) / 1e9 for size in formats]


@pytest.mark.parametrize("section", [None, [], 5, {}, {"dense_len": "x"}, {"dense_len": 0}])
def test_a_sparse_config_of_another_shape_says_nothing(section: object) -> None:
    raw = json.loads((GOLDEN / "minicpm4_like" / "config.json").read_text())
    assert not dense_attention(Config.from_dict(raw | {"sparse_config": section}))
