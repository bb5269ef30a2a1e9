"""The guide's example for fastllm, where it is installed, on the folder that its command writes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from minicpm_mlx.convert.checkpoint import convert
from support.guides import blocks


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ftllm") is None, reason="fastllm is not installed")
def test_fastllm_answers_as_the_guide_says(demo_folder: Path, tmp_path: Path) -> None:
    convert(demo_folder, tmp_path / "out", format="llama", dequantize=True)
    (program,) = blocks("python", "formats.md")
    done = subprocess.run(  # a process of its own: it ends the whole process at an error
        [sys.executable, "-c", program],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("The capital of France is Paris.")
