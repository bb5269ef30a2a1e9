"""Agents from npm, set up by what `connect` writes or prints, use tools and edit files."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomlkit

from support import node
from support.scripted_model import scripted_lm

pytest.importorskip("fastapi")

from support.serving import Live, serving

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

MCP_SERVER = Path(node.__file__).with_name("mcp_server.py")
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
    "town by codex": call("mcp__town__weather", place="Rome"),
    "Dry in Rome": "<think>I know.</think>It is dry there.",
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


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "a home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return folder


Ask = Callable[[str, str], str]
"""Runs an agent (its name in AGENTS) on a task; gives what it prints."""


@pytest.fixture
def ask(live: Live, project: Path, home: Path, pytestconfig: pytest.Config) -> Ask:
    def run(agent: str, task: str) -> str:
        package, arguments, more = AGENTS[agent]
        options = [text.replace("{home}", str(home)) for text in arguments[1:]]
        done = subprocess.run(
            [programs(pytestconfig, package) / arguments[0], *options, f"{task} by {agent}", *more],
            cwd=project,
            env={**os.environ, "NO_PROXY": "*", "PWD": str(project)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, (done.stdout, done.stderr, live.log)
        return done.stdout

    return run


def programs(config: pytest.Config, package: str) -> Path:
    return node.installed(config.cache, package, scripts=True) / "node_modules" / ".bin"


@pytest.mark.parametrize("agent", AGENTS)
def test_an_agent_looks_up_the_weather_and_writes_a_file(
    live: Live, project: Path, ask: Ask, agent: str, command, capsys, pytestconfig: pytest.Config
):
    bin = programs(pytestconfig, AGENTS[agent][0])
    client = {"claude": "claude-code"}.get(agent, agent)
    if agent == "cline":  # which keeps its settings itself
        assert command("connect", client, "--url", live.url, "--json") == 0
        start = shlex.split(json.loads(capsys.readouterr().out)["start"])
        subprocess.run([bin / start[0], *start[1:]], check=True, timeout=60)
    else:
        assert command("connect", client, "--url", live.url, "--write", "--yes") == 0
    assert "sunny there" in ask(agent, "weather")
    assert "note is there" in ask(agent, "note")
    for name, text in (("weather.txt", "Paris is sunny\n"), ("note.txt", NOTE)):
        assert (project / name).read_text() == text
        (project / name).unlink()


def test_codex_with_all_its_own_tools_calls_an_mcp_server(
    live: Live, home: Path, ask: Ask, command
):
    assert command("connect", "codex", "--url", live.url, "--write", "--yes") == 0
    path = home / ".codex" / "minicpm-mlx.config.toml"
    settings = tomlkit.parse(path.read_text())
    del settings["web_search"], settings["agents"]
    server = {"command": sys.executable, "args": [str(MCP_SERVER), "good"], "required": True}
    settings["mcp_servers"] = {"town": server}
    path.write_text(tomlkit.dumps(settings))
    assert "dry there" in ask("codex", "town")
