"""`chat -p` with --mcp: nobody can be asked, so a tool runs if the command line allows it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import minicpm_mlx as mm
from support.scripted_model import follow_script, write_scripted

SERVER = Path(__file__).parents[1] / "support" / "mcp_server.py"
CALL = '<function name="weather"><param name="place">{}</param></function>'
SCRIPT = {
    "Wien?": CALL.format("Wien"),
    "Dry in Wien": "It is dry.",
    "did not allow": "I was not allowed.",
    "Always?": CALL.format("Rom"),
    "Dry in Rom": CALL.format("Rom"),
}
Asked = Callable[..., tuple[int, str, str]]


@pytest.fixture
def asked(
    tmp_path: Path,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Asked:
    """Runs `chat -p` with the scripted model and a server of tools; status, output, errors."""
    pytest.importorskip("mcp", reason="needs the mcp package")
    write_scripted(tmp_path / "caller")
    servers = {"mcpServers": {"good": {"command": sys.executable, "args": [str(SERVER), "good"]}}}
    (tmp_path / "mcp.json").write_text(json.dumps(servers))
    load = mm.load
    monkeypatch.setattr(mm, "load", lambda *a, **k: follow_script(load(*a, **k), SCRIPT))

    def run(prompt: str, *options: str) -> tuple[int, str, str]:
        files = ("-m", str(tmp_path / "caller"), "--mcp", str(tmp_path / "mcp.json"))
        status = command("chat", *files, *options, "-p", prompt)
        return status, *capsys.readouterr()

    return run


def test_a_call_that_is_allowed_runs_and_the_answer_alone_is_output(asked: Asked) -> None:
    status, out, err = asked("Wien?", "--allow-tool", "weather")
    assert (status, out) == (0, "It is dry.\n")
    assert err == '▸ weather(place="Wien") · good\n  Dry in Wien\n'


def test_a_call_that_is_not_allowed_is_refused(asked: Asked) -> None:
    status, out, err = asked("Wien?", "--lang", "en")
    assert (status, out) == (0, "I was not allowed.\n")
    assert err.endswith("not run: nobody can be asked; --allow-tool weather allows it\n")
    assert "Dry" not in err
    status, out, err = asked("Wien?", "--allow-tool", "wether")
    assert (status, out) == (1, "")
    assert "there is no tool 'wether'; there are weather" in err


def test_calls_without_an_end_are_stopped_and_are_a_failure(asked: Asked) -> None:
    for language, said in (
        ("en", "stopped: 2 rounds of calls and no answer yet; --max-rounds N allows more\n"),
        ("zh", "已停止：连续调用了 2 轮工具仍没有回答；--max-rounds N 可放宽上限\n"),
    ):
        options = ("--allow-tool", "weather", "--max-rounds", "2", "--lang", language)
        status, out, err = asked("Always?", *options)
        assert (status, out.strip()) == (1, "")
        assert err.count("Dry in Rom") == 2
        assert err.endswith(said)
