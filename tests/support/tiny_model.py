"""A folder with a tiny model, whose work four processes can share, and all that goes with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from minicpm_mlx.text.chat_template import CHATML
from support.data import GOLDEN, write_tokenizer


def write_model(folder: Path, template: str = CHATML, *, case: str = "minicpm_2b_like") -> Path:
    """A golden case, with a tokenizer of bytes and a chat template."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / case / name, folder / name)
    write_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder
