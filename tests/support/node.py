"""Clients from npm, installed once into the tests' own cache, and programs that use them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

SECONDS = 240


def installed(cache: pytest.Cache, *packages: str, scripts: bool = False) -> Path:
    """A folder with npm packages (openai@6) in it; skips the test where they cannot be had.

    `scripts`: with their own steps of installation, which fetch nothing but packages.
    """
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("needs Node and npm")
    name = "npm-" + "-".join(packages).replace("/", "-")
    folder = Path(cache.mkdir(name))
    done = folder / "installed"
    if not done.exists():
        quiet = ["--no-audit", "--no-fund", *([] if scripts else ["--ignore-scripts"])]
        command = [npm, "install", *quiet, *packages]
        (folder / "package.json").write_text('{"private": true}')
        try:
            found = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            pytest.skip("npm install did not end; is its registry there?")
        if found.returncode:
            said = found.stderr.strip().splitlines() or ["no reason"]
            pytest.skip(f"npm install failed: {said[-1]}")
        done.touch()
    return folder


def run(folder: Path, program: str, *arguments: str) -> Any:
    """What an ES module prints as JSON; its arguments begin at process.argv[2]."""
    path = folder / "program.mjs"
    path.write_text(program, encoding="utf-8")
    done = subprocess.run(
        ["node", str(path), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
