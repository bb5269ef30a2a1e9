"""An identity changes with whatever would change an answer, and with nothing else."""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import minicpm_mlx as mm
from minicpm_mlx.lm.fingerprint import fingerprint


@pytest.fixture
def linked(demo: mm.LM, tmp_path: Path) -> mm.LM:
    """The demo model, as if loaded from a folder of links to its files."""
    folder = tmp_path / "linked"
    folder.mkdir()
    assert demo.folder is not None
    for file in demo.folder.iterdir():
        (folder / file.name).symlink_to(file)
    return replace(demo, folder=folder)


def flip(path: Path, at: int) -> None:
    """Change one byte of a linked file."""
    original = path.resolve()
    path.unlink()
    shutil.copy(original, path)
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_identity_is_that_of_the_files_wherever_they_lie(demo: mm.LM, linked: mm.LM) -> None:
    same = fingerprint(demo)
    assert fingerprint(linked) == same
    assert linked.folder is not None
    (linked.folder / "README.md").write_text("words")
    (linked.folder / "dir.json").mkdir()
    (linked.folder / "config.json").touch()
    assert fingerprint(linked) == same
    assert fingerprint(replace(linked, sampling=mm.Sampling(temperature=1))) == same


@pytest.mark.parametrize(
    ("file", "at"),
    [
        ("config.json", 0),
        ("config.json", -1),
        ("tokenizer.json", 1),
        ("tokenizer.json", -1),
        ("tokenizer_config.json", 9),
        ("model.safetensors", 8),
        ("model.safetensors", -1),
    ],
)
def test_identity_changes_with_one_byte(demo: mm.LM, linked: mm.LM, file: str, at: int) -> None:
    assert linked.folder is not None
    flip(linked.folder / file, at)
    assert fingerprint(linked) != fingerprint(demo)


def test_identity_takes_every_byte_of_a_large_tokenizer(linked: mm.LM) -> None:
    assert linked.folder is not None
    path = linked.folder / "tokenizer.json"
    seen = set()
    for at in (0, 3_000_001, 3_100_003):
        path.unlink()
        path.write_bytes(b" " * at + b"." + b" " * (6_000_000 - at))
        seen.add(fingerprint(linked))
    assert len(seen) == 3


def test_identity_changes_with_template_number_format_and_files(demo: mm.LM, linked: mm.LM) -> None:
    same = fingerprint(demo)
    tokenizer = copy.copy(demo.tokenizer)
    tokenizer.template = None
    assert fingerprint(replace(demo, tokenizer=tokenizer)) != same
    twin = mm.Config(
        **asdict(demo.config) | {"rope_theta": 5.0, "quantization": None, "layer_quantization": ()}
    )
    model = copy.copy(demo.model)
    object.__setattr__(model, "config", twin)
    assert fingerprint(replace(demo, model=model)) != same
    assert linked.folder is not None
    (linked.folder / "chat_template.jinja").write_text("{{ messages }}")
    assert fingerprint(linked) != same
