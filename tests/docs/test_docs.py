"""The guides' commands parse, their options exist, and their numbers are the library's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import minicpm_mlx as mm
from minicpm_mlx import device
from minicpm_mlx.train.lora import LoRAConfig
from minicpm_mlx.train.memory import TrainingMemory, estimate_memory, fit_to_memory
from support.guides import SHAPE, commands, options, parsed, rows, text

GUIDES = ["finetuning.md", "finetuning_zh.md"]


@pytest.fixture
def config(tmp_path: Path) -> mm.Config:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return mm.Config.load(tmp_path)


@pytest.mark.parametrize("name", GUIDES)
def test_every_command_of_a_guide_parses(name: str) -> None:
    given = [arguments for arguments in commands(name) if "--help" not in arguments]
    assert len(given) > 15
    for arguments in given:
        list(parsed(arguments))  # a usage error, if they do not


def test_an_option_that_does_not_exist_would_be_noticed() -> None:
    for line in ("lora --data x --ranks 8", "launch -n 2 -- lora --data x --ranks 8", "lora"):
        with pytest.raises(Exception, match=r"ranks|data"):
            list(parsed(shlex.split(line)))


def test_both_guides_give_the_same_commands_and_files() -> None:
    english, chinese = map(commands, GUIDES)
    assert english == chinese
    blocks = [re.findall(r"^```json\n.*?^```$", text(n), re.DOTALL | re.MULTILINE) for n in GUIDES]
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize("name", GUIDES)
def test_every_option_named_in_a_guide_exists(name: str) -> None:
    spans = re.findall(r"`([^`\n]+)`", text(name))
    named = {word for span in spans for word in re.findall(r"(?<!\S)--[a-z-]+", span)}
    assert len(named) > 40
    assert named - options() <= {"--lora", "--help"}, "llama.cpp's own, and what all have"


@pytest.mark.parametrize("name", GUIDES)
def test_both_guides_have_the_same_tables(name: str) -> None:
    shapes = [
        [line.count(" | ") for line in text(guide).splitlines() if line.startswith("| ")]
        for guide in (name, GUIDES[0])
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", GUIDES)
def test_memory_shown_is_what_is_foretold(name: str, config: mm.Config) -> None:
    shown = rows(name, r"\d+")
    assert len(shown) == 4
    for length, *sizes in shown:
        ways = [(size, twice) for size in (1, 4) for twice in (True, False)]
        foretold = [
            estimate_memory(
                config,
                LoRAConfig(),
                batch_size=size,
                length=int(length),
                checkpointing=twice,
                dtype="bfloat16",
            )
            for size, twice in ways
        ]
        assert sizes == [f"{one.total / 1e9:.1f}" for one in foretold]


@pytest.mark.parametrize("name", GUIDES)
def test_choices_shown_are_those_made(
    name: str, config: mm.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "slow_exponentials", lambda: False)  # as on a Mac
    shown = rows(name, r"\d+ GB")
    assert len(shown) == 6
    for place, (mac, _, *cells) in enumerate(shown):
        free = int(mac.removesuffix(" GB")) * 2**30 * 3 // 4
        monkeypatch.setattr(device, "available_memory", lambda free=free: free)
        kind = ("sft", "preference")[place % 2]
        chosen = [
            fit_to_memory(
                config, LoRAConfig(), samples=4, length=length, kind=kind, dtype="bfloat16"
            )
            for length in (512, 1024, 2048, 4096)
        ]
        assert cells == [cell(one) for one in chosen]


def cell(found: TrainingMemory) -> str:
    if not found.fits:
        return "—"
    return f"{found.batch_size} t" if found.checkpointing else str(found.batch_size)
