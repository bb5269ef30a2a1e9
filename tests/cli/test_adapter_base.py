"""An adapter brings its own base: commands without --model take the one it was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import minicpm_mlx as mm
from minicpm_mlx.cli import options
from minicpm_mlx.errors import InvalidArgumentError
from support.adapters import random_adapter, saved

Command = Callable[..., int]
Out = pytest.CaptureFixture[str]
ASK = ("-p", "Hello", "--temp", "0", "--max-tokens", "4")


@pytest.fixture
def adapter(tiny: mm.LM, tmp_path: Path) -> Path:
    """An adapter that names the tiny model's folder as mlx-lm's trainer does."""
    made = random_adapter(tiny.model)  # type: ignore[arg-type]
    return saved(tmp_path / "adapter", made, "mlx", model=str(tiny.folder))


def named(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "adapters.safetensors").touch()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_a_reply_comes_from_the_base_and_says_so(
    verb: str, adapter: Path, tiny: mm.LM, command: Command, capsys: Out
) -> None:
    save = ["--no-save"] if verb == "chat" else []
    assert command(verb, "--adapter", str(adapter), *ASK, *save) == 0
    alone = capsys.readouterr()
    assert f"model: {tiny.folder}, the base of {adapter} (--model takes another)" in alone.err
    given = ("--model", str(tiny.folder))
    assert command(verb, "--adapter", str(adapter), *given, *ASK, *save) == 0
    explicit = capsys.readouterr()
    assert explicit.out == alone.out
    assert "the base of" not in explicit.err


def test_fuse_and_export_need_no_model(
    adapter: Path, tiny: mm.LM, tmp_path: Path, command: Command, capsys: Out
) -> None:
    fused, exported = tmp_path / "fused", tmp_path / "exported"
    assert command("fuse", str(fused), "--adapter", str(adapter)) == 0
    assert (fused / "config.json").is_file()
    layout = ("--format", "mlx", "--base-format", "llama")
    assert command("export-adapter", str(adapter), str(exported), *layout) == 0
    said = capsys.readouterr()
    assert said.err.count(f"model: {tiny.folder}, the base of {adapter}") == 2
    assert "for a base in llama form (muP folded into its weights)" in said.out
    record = json.loads((exported / "adapter_config.json").read_text())
    assert record["base_form"]["format"] == "llama"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "mlx", "--base-format", "gguf"), "--base-format must be one of mup, llama"),
        (("--format", "onnx"), "--format must be one of peft, mlx, gguf, got 'onnx'"),
    ],
)
def test_what_export_cannot_write_is_said_before_a_base_is_fetched(
    options: tuple[str, ...], message: str, tmp_path: Path, command: Command, capsys: Out
) -> None:
    adapter = named(tmp_path / "adapter", model="org/name")
    assert command("export-adapter", str(adapter), str(tmp_path / "out"), *options) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "org/name" not in said


def test_fuse_takes_no_third_folder(
    adapter: Path, tmp_path: Path, command: Command, capsys: Out
) -> None:
    places = [str(tmp_path / name) for name in "abc"]
    assert command("fuse", *places, "--adapter", str(adapter)) != 0
    assert "expected [SOURCE] FOLDER, got 3 arguments" in capsys.readouterr().err


def test_a_base_that_is_not_here_is_asked_for(
    tmp_path: Path, command: Command, capsys: Out
) -> None:
    adapter = named(tmp_path / "adapter", base_model_name_or_path="/models/mine")
    for verb in ("generate", "chat"):
        assert command(verb, "--adapter", str(adapter), "-p", "Hello") != 0
        said = capsys.readouterr().err
        assert "was trained on /models/mine, which is not here; say where" in said
        assert "--model" in said


@pytest.mark.parametrize(
    ("says", "base"),
    [
        ({}, options.DEFAULT_MODEL),
        ({"model": ""}, options.DEFAULT_MODEL),
        ({"model": None, "base_model_name_or_path": 3}, options.DEFAULT_MODEL),
        ({"base_model_name_or_path": "openbmb/MiniCPM-1B-sft-bf16"}, "openbmb/MiniCPM-1B-sft-bf16"),
        ({"model": "org/name@v2"}, "org/name@v2"),
        ({"model": "demo"}, "demo"),
    ],
)
def test_the_name_is_a_card_a_repository_or_none(
    says: dict[str, Any], base: str, tmp_path: Path, capsys: Out
) -> None:
    adapter = named(tmp_path / "adapter", **says)
    assert options.choose_model(None, [adapter]) == base
    assert ("the base of" in capsys.readouterr().err) == (base != options.DEFAULT_MODEL)
    assert options.choose_model("mine", [adapter]) == "mine"


def test_what_a_training_recorded_names_it_too(tmp_path: Path) -> None:
    adapter = named(tmp_path / "adapter")
    for name, repo, expected in (
        ("demo", None, "demo"),
        ("gone", "org/name", "org/name"),
    ):
        record = {"base": {"name": name, "repo": repo}}
        (adapter / "training.json").write_text(json.dumps(record))
        assert options.choose_model(None, [adapter]) == expected


def test_adapters_served_together_have_one_base(tmp_path: Path) -> None:
    demo, other, silent = (
        named(tmp_path / name, **config)
        for name, config in (("a", {"model": "demo"}), ("b", {"model": "org/name"}), ("c", {}))
    )
    assert options.choose_model(None, [demo, silent]) == "demo"
    with pytest.raises(InvalidArgumentError, match=r"different models .*demo.*org/name.*--model"):
        options.choose_model(None, [demo, other])
