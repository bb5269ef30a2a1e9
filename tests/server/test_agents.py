"""Agents from npm, set up by what `connect` writes or prints, use tools and edit files."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import node
from support.scripted_model import scripted_lm

pytest.importorskip("fastapi")

from support.serving import Live, serving

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

VARIABLES = (
    *("XDG_CONFIG_HOME", "CODEX_HOME", "CLAUDE_CONFIG_DIR", "OPENCODE_CONFIG"),
    *("PI_CODING_AGENT_DIR", "CONTINUE_GLOBAL_DIR", "MINICPM_MLX_API_KEY"),
)
RESULT = "</function><|im_end|>\n<|im_start|>user\n"
"""A prompt has it before what a tool answered, whatever that says."""
LOOK = "echo 'Paris is sunny' | tee weather.txt"
NOTE = "three < four & five\n"


def call(name: str, **values: str) -> str:
    params = "".join(f'<param name="{key}">{value}</param>' for key, value in values.items())
    return f'<think>I act.</think><function name="{name}">{params}</function>'


SCRIPT = {
    "weather by codex": call("exec_command", cmd=LOOK),
    "weather by claude": call("Bash", command=LOOK, description="weather"),
    "weather by pi": call("bash", command=LOOK),
    "weather by cline": call("run_commands", commands=json.dumps([LOOK])),
    "weather by continue": call("Bash", command=LOOK),
    "weather by opencode": call("bash", command=LOOK, description="weather"),
    "note by codex": call("exec_command", cmd=f"printf '{NOTE[:-1]}\\n' > note.txt"),
    "note by claude": call("Write", file_path="{folder}/note.txt", content=NOTE),
    "note by pi": call("write", path="note.txt", content=NOTE),
    "note by cline": call("editor", path="{folder}/note.txt", new_text=NOTE),
    "note by continue": call("Write", filepath="note.txt", content=NOTE),
    "note by opencode": call("write", filePath="{folder}/note.txt", content=NOTE),
    RESULT: "<think>Done.</think>The note is there.",
    "is sunny": "<think>I know.</think>It is sunny there.",
}

AGENTS = {
    "codex": (
        "@openai/codex@0.171",
        ("codex", "exec", "--skip-git-repo-check", "--profile", "minicpm-mlx"),
        ("--dangerously-bypass-approvals-and-sandbox",),
    ),
    "pi": (
        "@earendil-works/pi-coding-agent@0.74.2",
        ("pi", "-p", "--provider", "minicpm-mlx", "--model", "scripted"),
        (),
    ),
    "cline": ("cline@3", ("cline",), ()),
    "continue": (
        "@continuedev/cli@1",
        ("cn", "-p", "--auto", "--config", "{home}/.continue/config.yaml"),
        (),
    ),
    "opencode": ("opencode-ai@1", ("opencode", "run", "-m", "minicpm-mlx/scripted"), ()),
    "claude": (
        "@anthropic-ai/claude-code@2",
        ("claude", "-p", "--settings", "{home}/.claude/minicpm-mlx.json"),
        ("--tools", "Bash,Write", "--allowedTools", "Bash,Write"),
    ),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("a project")


@pytest.fixture(scope="module")
def live(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("scripted") / "scripted"
    script = {key: text.replace("{folder}", str(project)) for key, text in SCRIPT.items()}
    with serving(scripted_lm(folder, script, positions=400_000)) as served:
        yield served


@pytest.mark.parametrize("agent", AGENTS)
def test_an_agent_looks_up_the_weather_and_writes_a_file(
    live: Live,
    project: Path,
    agent: str,
    tmp_path: Path,
    command,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
):
    package, arguments, more = AGENTS[agent]
    tools = node.installed(pytestconfig.cache, package, scripts=True)
    home = tmp_path / "a home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    programs = tools / "node_modules" / ".bin"
    client = {"claude": "claude-code"}.get(agent, agent)
    if agent == "cline":  # which keeps its settings itself
        assert command("connect", client, "--url", live.url, "--json") == 0
        start = shlex.split(json.loads(capsys.readouterr().out)["start"])
        subprocess.run([programs / start[0], *start[1:]], check=True, timeout=60)
    else:
        assert command("connect", client, "--url", live.url, "--write", "--yes") == 0
    program = str(programs / arguments[0])
    options = [text.replace("{home}", str(home)) for text in arguments[1:]]
    for task, answer in (("weather", "sunny there"), ("note", "note is there")):
        done = subprocess.run(
            [program, *options, f"{task} by {agent}", *more],
            cwd=project,
            env={**os.environ, "NO_PROXY": "*", "PWD": str(project)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert answer in done.stdout, (done.stdout, done.stderr, live.log)
    for name, text in (("weather.txt", "Paris is sunny\n"), ("note.txt", NOTE)):
        assert (project / name).read_text() == text
        (project / name).unlink()
