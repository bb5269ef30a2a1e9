"""`lora` and `dpo` look at options, folders and all data before the network or a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm_mlx import device
from minicpm_mlx.loading import download
from support.hub import REPO, Hub
from support.tiny_model import write_model

Command = Callable[..., int]

TALK = {"prompt": "q", "completion": "a"}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
FILES = {
    "talks.jsonl": [TALK] * 20,
    "pairs.jsonl": [PAIR] * 20,
    "judged.jsonl": [{**TALK, "label": True}, {**TALK, "label": False}] * 10,
    "texts.jsonl": [{"text": "a"}] * 20,
    "broken.jsonl": [TALK, TALK, {"prompt": "q"}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in FILES.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "train").mkdir()
    (tmp_path / "file").write_text("x")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lora --data {at}/nope.jsonl", "{at}/nope.jsonl: No such file or directory"),
        ("dpo --data {at}/nope.jsonl", "{at}/nope.jsonl: No such file or directory"),
        ("lora --data {at}/file", "expected a file ending in .jsonl"),
        ("lora --data {at}/train", "expected a file train.jsonl or"),
        ("lora --data {at}/broken.jsonl", "broken.jsonl:3: expected completion or response beside"),
        ("dpo --data {at}/talks.jsonl", "expected preferences (chosen and rejected, or a label)"),
        ("dpo --data {at}/pairs.jsonl --loss kto", "expected labelled replies"),
        ("dpo --data {at}/pairs.jsonl --beta -1", "--beta must be above 0, got -1.0"),
        ("dpo --data {at}/judged.jsonl --batch-size 1", "--batch-size must be 2 or more for kto"),
        ("dpo --data {at}/pairs.jsonl --fine-tune-type full", "which full training overwrites"),
        ("dpo --data {at}/pairs.jsonl --mask all", "--mask all is not for preferences"),
        ("lora --data {at}/texts.jsonl --mask last", "--mask last is not for plain text"),
        ("lora --data {at}/talks.jsonl --loss dpo", "--loss is for preferences, and these data"),
        ("lora --data {at}/talks.jsonl --test", "--test needs a test set"),
        ("lora --data {at}/talks.jsonl --adapter-path {at}/file", "file is a file; give a folder"),
        ("lora --data {at}/talks.jsonl --adapter-path {at}/file/new", "cannot be written"),
        ("lora --data {at}/talks.jsonl --report wandb", "wandb needs wandb: pip install wandb"),
        ("lora --data {at}/talks.jsonl --resume", "has no checkpoint to resume from"),
        ("lora --data {at}/talks.jsonl --device tpu", "--device must be gpu or cpu"),
    ],
)
def test_a_mistake_is_named_before_the_network_or_a_model(
    line: str,
    message: str,
    folder: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fetch(*_: object, **__: object) -> Path:
        pytest.fail("went for the model first")

    monkeypatch.setattr(download, "fetch", fetch)
    monkeypatch.setattr(download, "fetch_texts", fetch)
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = line.format(at=folder).split()
    if "--adapter-path" not in words:
        words += ["--adapter-path", str(folder / "new")]
    assert command(*words, "--model", "minicpm-2b-dpo") == 1
    assert message.format(at=folder) in capsys.readouterr().err
    assert not (folder / "new").exists()


@pytest.mark.parametrize("option", ["--validation", "--config", "--resume"])
def test_an_option_that_there_is_not_is_a_mistake_of_usage(
    option: str, folder: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("lora", "--data", str(folder / "talks.jsonl"), option, "nope") == 2
    error = capsys.readouterr().err
    assert (option if option != "--resume" else "nope") in error


@pytest.fixture
def hub_model(hub_server: Hub, tmp_path: Path) -> Hub:
    """The hub with a model that can be trained."""
    model = write_model(tmp_path / "model")
    hub_server.repos[REPO] = {path.name: path.read_bytes() for path in model.iterdir()}
    return hub_server


def test_a_dry_run_fetches_no_weights(
    hub_model: Hub, folder: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("lora", "--data", str(folder / "talks.jsonl"), "--model", REPO)
    out = ("--adapter-path", str(folder / "new"))
    assert command(*run, "--dry-run") == 0
    assert "18 samples of 18 rows" in capsys.readouterr().out
    assert command(*run, *out, "--num-layers", "99") == 1
    assert "--num-layers must be at most 3" in capsys.readouterr().err
    assert hub_model.got()
    assert not any(name.endswith(".safetensors") for name in hub_model.got())
    short = ("--iters", "1", "--batch-size", "1", "--replies", "0", "--no-grad-checkpoint")
    assert command(*run, *out, *short) == 0
    assert "model.safetensors" in hub_model.got()
    hub_model.stop()
    assert command(*run, "--dry-run") == 0


def test_a_packed_model_is_not_trained_whole_and_that_is_known_before_it_is_fetched(
    hub_model: Hub,
    folder: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = json.loads(hub_model.repos[REPO]["config.json"])
    config["quantization"] = {"bits": 4, "group_size": 32}
    hub_model.repos[REPO]["config.json"] = json.dumps(config).encode()
    monkeypatch.setattr(device, "unpack_to", lambda *_: None)
    run = ("lora", "--data", str(folder / "talks.jsonl"), "--model", REPO, "--fine-tune-type")
    assert command(*run, "full", "--adapter-path", str(folder / "new")) == 1
    assert "full training needs unpacked weights" in capsys.readouterr().err
    assert not any(name.endswith(".safetensors") for name in hub_model.got())


def test_other_options_are_refused_before_a_model_is_loaded_to_resume(
    tmp_path: Path,
    folder: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = write_model(tmp_path / "model")
    run = ("lora", "--data", str(folder / "talks.jsonl"), "--model", str(model), "--iters", "2")
    run = (*run, "--batch-size", "2", "--replies", "0", "--adapter-path", str(folder / "new"))
    assert command(*run) == 0
    (model / "model.safetensors").unlink()
    for more, message in (
        (("--seed", "1"), "another --seed: it was 0, and is 1"),
        (("--rank", "4"), "another --rank: it was 8, and is 4"),
        (("--learning-rate", "1"), "another --learning-rate"),
    ):
        assert command(*run, *more, "--resume") == 1
        assert message in capsys.readouterr().err
