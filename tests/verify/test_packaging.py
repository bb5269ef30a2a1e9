"""The built package has the files that `doctor --verify` and `bench --predict` read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from support.source import ROOT

ROW = {"model": "2b-shape"}


def test_the_built_package_has_golden_logits_and_measured_rows(tmp_path: Path) -> None:
    source, built = tmp_path / "source", tmp_path / "built"
    ignore = shutil.ignore_patterns("__pycache__", "results", "*.egg-info")
    for name in ("minicpm_mlx", "cli", "models", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    (source / "benchmarks" / "macs" / "m4.json").write_text(json.dumps([ROW]))
    build = "import setuptools; setuptools.setup()"
    arguments = ["-q", "build_py", "--build-lib", str(built)]
    done = subprocess.run(
        [sys.executable, "-c", build, *arguments],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    package = built / "minicpm_mlx"
    logits = package / "verify" / "logits.npz"
    assert logits.read_bytes() == (ROOT / "minicpm_mlx" / "verify" / "logits.npz").read_bytes()
    assert json.loads((package / "bench" / "macs" / "m4.json").read_text()) == [ROW]
    assert (package / "verify" / "run.py").is_file()
