"""What `lora` says before and after a run."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from minicpm_mlx.cli.render.texts import TEXTS
from minicpm_mlx.cli.render.theme import console
from minicpm_mlx.cli.train import report
from minicpm_mlx.train.data.dataset import Data
from minicpm_mlx.train.data.samples import Item
from minicpm_mlx.train.finetune import TrainingResult
from minicpm_mlx.train.memory import TrainingMemory
from minicpm_mlx.train.planning import TrainingPlan

RESULT = TrainingResult(
    complete=True,
    steps=9,
    best=1.25,
    best_step=6,
    validated=True,
    test=None,
    whole=False,
    folder=Path("out"),
)


NEEDED = TrainingMemory(
    weights=1_250_000,
    trained=2_000_000,
    activations=500_000,
    working=3_000_000,
    available=8_000_000_000,
    batch_size=4,
    length=40,
    checkpointing=False,
)


def said(result: TrainingResult, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    report.close("demo", folder, replace(result, folder=folder), as_json=False)
    return capsys.readouterr().out.splitlines()


def test_the_end_of_a_run_says_what_was_kept_and_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = ["to chat with the result:", f"  minicpm-mlx chat --model demo --adapter {tmp_path}"]
    assert said(RESULT, tmp_path, capsys) == ["best validation loss 1.2500, at step 6", *chat]
    assert said(replace(RESULT, best=None, best_step=0), tmp_path, capsys) == chat
    tested = replace(RESULT, best_step=0, test={"loss": 1.5, "perplexity": 4.4817})
    assert said(replace(tested, complete=False), tmp_path, capsys) == [
        "no validation loss fell below that before training, 1.2500: the last step is kept",
        "test loss 1.5000",
        "test perplexity 4.4817",
        "the same command with --resume continues the run",
        *chat,
    ]
    stopped = replace(RESULT, complete=False, best_step=0, validated=False)
    assert said(stopped, tmp_path, capsys) == [
        "stopped before a validation, the last step is kept; loss before training 1.2500",
        "the same command with --resume continues the run",
        *chat,
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_the_end_of_a_run_is_told_in_the_language_of_the_terminal(
    terminal: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    text = "\n".join(said(replace(RESULT, complete=False, test={"loss": 2.0}), tmp_path, capsys))
    chinese = (
        "最佳验证损失 1.2500（第 6 步）",
        "测试集 loss 2.0000",
        "--resume",
        "与训练结果对话：",
    )
    assert all(words in text for words in chinese) is terminal
    assert ("best validation loss" in text) is not terminal
    assert f"minicpm-mlx chat --model demo --adapter {tmp_path}" in text
    again = "".join(said(replace(RESULT, best_step=0), tmp_path, capsys))
    assert ("验证损失始终不低于训练前的 1.2500，保留最后一步" in again) is terminal


def test_what_is_announced_is_folded_between_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty: list[Item] = []
    data = Data(
        train=empty,
        valid=empty,
        test=empty,
        format="chat messages",
        kind="sft",
        counts={},
        notes=("no validation set, so 4 of 40 samples were drawn as one, with seed 0",),
        bad=(),
        overlong=(),
        sha256={},
        prompts=(),
        max_seq_length=2048,
    )
    told = []
    for width in (1000, 34):
        monkeypatch.setattr(console(stderr=True), "width", width)
        report.announce(data, TrainingPlan(steps=5), NEEDED)
        told.append(capsys.readouterr().err)
    assert len(told[0].splitlines()) == 5
    assert max(map(len, told[1].splitlines())) <= 34
    assert told[0].split() == told[1].split()


def test_memory_is_told_in_a_unit_in_which_it_is_something() -> None:
    assert NEEDED.described == (
        "memory: about 6.8 MB of 8.0 GB free "
        "(weights 1.25, trained 2.00, activations 0.50, working 3.00)"
    )
    assert replace(NEEDED, weights=1_530_000_000, checkpointing=True).described == (
        "memory: about 1.5 GB of 8.0 GB free "
        "(weights 1.53, trained 0.00, activations 0.00, working 0.00), layers computed twice"
    )


def test_every_text_takes_the_same_values_in_both_languages() -> None:
    for key, texts in TEXTS.items():
        english, chinese = (re.findall(r"{(\w+)", text) for text in texts)
        assert sorted(english) == sorted(chinese), key
