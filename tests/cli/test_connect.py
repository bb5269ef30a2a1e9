"""`minicpm-mlx connect`: settings printed, and merged into files that people have written."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tomlkit
import yaml

from minicpm_mlx.clients import jsonc
from minicpm_mlx.clients.catalogue import CLIENTS, find_client
from minicpm_mlx.clients.notes import short_context
from minicpm_mlx.clients.server_address import ServerAddress

Command = Callable[..., int]
FILES = [client.name for client in CLIENTS if client.path]
VARIABLES = (
    *("CLAUDE_CONFIG_DIR", "CODEX_HOME", "OPENCODE_CONFIG", "PI_CODING_AGENT_DIR", "LLM_USER_PATH"),
    *("AICHAT_CONFIG_DIR", "CONTINUE_GLOBAL_DIR", "XDG_CONFIG_HOME", "MINICPM_MLX_API_KEY"),
)
NOWHERE = ("--url", "http://127.0.0.1:1", "--model", "m5")


@pytest.fixture(autouse=True)
def person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a space in its name."""
    folder = tmp_path / "a person"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return folder


def parse(path: Path) -> object:
    text = path.read_text()
    if path.suffix == ".toml":
        return tomlkit.parse(text).unwrap()
    return yaml.safe_load(text) if path.suffix == ".yaml" else jsonc.parse(text)


def path_of(name: str) -> Path:
    client = next(client for client in CLIENTS if client.name == name)
    assert client.path
    return client.path()


def test_the_list_names_every_client_and_its_file(command: Command, capsys, person: Path):
    assert command("connect") == 0
    out = capsys.readouterr().out
    assert all(client.title in out for client in CLIENTS)
    assert command("connect", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["clients"]
    assert [row["name"] for row in rows] == [client.name for client in CLIENTS]
    assert all(row["file"] is None or row["file"].startswith(str(person)) for row in rows)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_written_once_and_says_what_is_printed(command: Command, capsys, name: str):
    assert command("connect", name, *NOWHERE, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert command("connect", name, *NOWHERE, "--write", "--yes") == 0
    path = path_of(name)
    assert path.read_text().strip() == printed["text"]
    assert "m5" in path.read_text()
    before = path.stat().st_mtime_ns
    capsys.readouterr()
    assert command("connect", name, *NOWHERE, "--write") == 0
    assert "nothing to change" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    other = ("--url", "http://127.0.0.1:2/v1/", "--model", "org/m:6")
    assert command("connect", name, *other, "--write", "--yes") == 0
    assert "http://127.0.0.1:2" in path.read_text()
    assert "http://127.0.0.1:1" not in path.read_text()
    assert "org/m:6" in path.read_text()


@pytest.mark.parametrize("name", [client.name for client in CLIENTS])
def test_a_key_is_named_and_never_written_unasked(
    command: Command, capsys, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setenv("MINICPM_MLX_API_KEY", "very-secret")
    assert command("connect", name, *NOWHERE) == 0
    shown = capsys.readouterr()
    assert "very-secret" not in shown.out + shown.err
    if name in FILES:
        assert command("connect", name, *NOWHERE, "--write", "--yes") == 0
        assert "very-secret" not in path_of(name).read_text()


def test_a_key_that_is_given_is_written_for_the_owner_alone(command: Command):
    assert command("connect", "codex", *NOWHERE, "--api-key", "k1", "--write", "-y") == 0
    path = path_of("codex")
    provider = parse(path)["model_providers"]["minicpm-mlx"]  # type: ignore[index]
    assert provider["experimental_bearer_token"] == "k1"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


ZED = """\
// Zed settings
{
  "theme": "One Dark", // dark
  /* fonts */
  "buffer_font_size": 15,
  "language_models": {
    "ollama": { "api_url": "http://localhost:11434" }, // mine
  },
}
"""


def test_comments_and_other_settings_stay_in_json(command: Command, capsys):
    path = path_of("zed")
    path.parent.mkdir(parents=True)
    path.write_text(ZED)
    path.chmod(0o640)
    assert command("connect", "zed", *NOWHERE, "--write", "--yes") == 0
    text = path.read_text()
    for line in ZED.splitlines():
        assert line.rstrip(",") in text
    models = jsonc.parse(text)["language_models"]
    assert models["ollama"] == {"api_url": "http://localhost:11434"}
    assert models["openai_compatible"]["minicpm-mlx"]["available_models"][0]["name"] == "m5"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    copy = next(file for file in path.parent.iterdir() if ".bak-" in file.name)
    assert copy.read_text() == ZED
    diff = capsys.readouterr().err
    assert '+    "openai_compatible": {' in diff
    assert '-  "theme"' not in diff


CONTINUE = """\
name: Mine  # my own
version: 2.0.0
schema: v1

models:
  # the good one
  - name: gpt
    provider: openai
    model: "gpt-5"   # quoted
    roles: [chat, edit]

  - name: minicpm-mlx
    provider: openai
    model: old
    env: {a: 1}
# end of models
rules:
  - |
    Be brief.

    Always.
"""


def test_comments_and_other_settings_stay_in_yaml(command: Command):
    path = path_of("continue")
    path.parent.mkdir(parents=True)
    path.write_text(CONTINUE)
    assert command("connect", "continue", *NOWHERE, "--write", "--yes") == 0
    text = path.read_text()
    for line in CONTINUE.splitlines():
        assert line in text or line == "    model: old"
    found = yaml.safe_load(text)
    assert found["name"] == "Mine"
    assert [model["name"] for model in found["models"]] == ["gpt", "minicpm-mlx"]
    assert found["models"][1]["model"] == "m5"
    assert found["models"][1]["env"] == {"a": 1}
    assert found["rules"] == ["Be brief.\n\nAlways.\n"]


@pytest.mark.parametrize(
    "text",
    [
        "- model_id: mine\n  model_name: x\n  api_base: http://h/v1  # here\n\n# last words\n",
        "- {model_id: mine, model_name: x}\n",
        "- model_id: mine\n  headers:\n    a: b",
        "-   model_id: mine\n    model_name: x\n",
        "# only a comment\n",
        "[]\n",
        "[{model_id: mine}]\n",
        "",
    ],
)
def test_a_model_is_added_to_a_list_however_it_is_written(command: Command, text: str):
    path = path_of("llm")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert command("connect", "llm", *NOWHERE, "--write", "--yes") == 0
    assert yaml.safe_load(path.read_text())[:-1] == (yaml.safe_load(text) or [])
    assert yaml.safe_load(path.read_text())[-1]["model_name"] == "m5"
    for comment in ("# here", "# last words", "# only a comment"):
        assert (comment in text) == (comment in path.read_text())


@pytest.mark.parametrize(
    "text", ["clients:\n", "clients: # none yet\n", "clients: []\n", "keybindings: emacs\n"]
)
def test_an_empty_key_is_filled(command: Command, text: str):
    path = path_of("aichat")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert command("connect", "aichat", *NOWHERE, "--write", "--yes") == 0
    assert yaml.safe_load(path.read_text())["clients"][0]["models"][0]["name"] == "m5"


def test_toml_keeps_comments_and_gets_a_new_address(command: Command):
    path = path_of("codex")
    path.parent.mkdir(parents=True)
    mine = (
        '# mine\nmodel = "old" # this\napproval_policy = "never"\n\n[model_providers.minicpm-mlx]\n'
    )
    path.write_text(mine + 'base_url = "http://old" # there\n\n[tui]\nnotifications = true\n')
    assert command("connect", "codex", *NOWHERE, "--write", "--yes") == 0
    text = path.read_text()
    assert all(comment in text for comment in ("# mine", "# this", "# there"))
    found = tomlkit.parse(text).unwrap()
    assert found["model"] == "m5"
    assert found["approval_policy"] == "never"
    assert found["tui"] == {"notifications": True}
    assert found["model_providers"]["minicpm-mlx"]["base_url"] == "http://127.0.0.1:1/v1"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("zed", text) for text in (b"{", b'{"a": 1', b"[1]", b'{"a" 1}', b"\xff\xfe{}", b"{} x")),
        *(("zed", b"[" * 100_000), ("zed", b'{"a": "\n"}')),
        *(
            ("continue", text)
            for text in (b"a: [", b"- 1\n", b"a: b: c", b"---\na: 1\n---\nb: 2\n")
        ),
        *(("llm", text) for text in (b"a: 1\n", b"text", b"\t- x")),
        *(("codex", text) for text in (b"a =", b"a = 1\na = 2\n", b"[x\n")),
    ],
)
def test_a_file_that_cannot_be_read_is_left_alone(
    command: Command, capsys, name: str, content: bytes
):
    path = path_of(name)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert command("connect", name, *NOWHERE, "--write", "--yes") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"minicpm-mlx: {path}: ")
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("opencode", '{"provider": ["mine"]}', "provider: expected settings by name, got a list"),
        ("opencode", '{"provider": {"minicpm-mlx": "x"}}', "provider.minicpm-mlx: expected"),
        ("pi", '{"providers": {"minicpm-mlx": {"models": {"a": 1}}}}', "expected a list"),
        ("codex", "agents = true\n", "agents: expected settings by name, got a single value"),
        ("continue", "name: {a: b}\nmodels: []\n", ""),
        ("continue", "models: {a: b}\n", "models: expected a list"),
        ("llm", "- model_id: minicpm-mlx\n  api_base: {a: b}\n", "0.api_base: expected a single"),
        ("aichat", "clients:\n- name: minicpm-mlx\n  models: all\n", "clients.0.models: expected"),
    ],
)
def test_settings_of_another_kind_are_not_overwritten(
    command: Command, capsys, name: str, content: str, problem: str
):
    path = path_of(name)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    refused = bool(problem)
    assert command("connect", name, *NOWHERE, "--write", "--yes") == refused
    assert problem in capsys.readouterr().err
    assert (path.read_text() == content) == refused


def test_what_is_read_only_or_no_file_is_left_alone(command: Command, capsys):
    path = path_of("pi")
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    path.chmod(0o444)
    assert command("connect", "pi", *NOWHERE, "--write") == 1
    assert "is read-only" in capsys.readouterr().err
    path.unlink()
    os.mkfifo(path)
    assert command("connect", "pi", *NOWHERE, "--write") == 1
    assert "is no file" in capsys.readouterr().err


def test_a_file_named_by_a_variable_may_end_in_anything(
    command: Command, person: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENCODE_CONFIG", "~/settings.conf")
    (person / "settings.conf").write_text("// mine\n{}\n")
    assert command("connect", "opencode", *NOWHERE, "--write", "--yes") == 0
    text = (person / "settings.conf").read_text()
    assert text.startswith("// mine\n")
    assert jsonc.parse(text)["provider"]["minicpm-mlx"]["models"]["m5"]["name"] == "m5"


def test_the_command_that_is_printed_undoes_it(command: Command, capsys, person: Path):
    target, path = person / "real.json", path_of("pi")
    path.parent.mkdir(parents=True)
    path.symlink_to(target)
    for before in (None, '{"providers": {}}'):
        if before:
            target.write_text(before)
        assert command("connect", "pi", *NOWHERE, "--write", "--yes") == 0
        [undo] = [line for line in capsys.readouterr().out.splitlines() if "undo: " in line]
        subprocess.run(shlex.split(undo)[1:], check=True)
        assert (target.read_text() if target.exists() else None) == before
        path.unlink(missing_ok=True)
        path.symlink_to(target)


def test_a_person_is_told_in_their_language(
    command: Command, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert command("connect", "codex", *NOWHERE, "--write") == 1
    assert "没有写入" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for name in ("openai-python", "codex", "cline", "zed", "open-webui"):
        client = find_client(name)
        assert command("connect", name, *NOWHERE) == 0
        shown = capsys.readouterr()
        heads = [line for line in (shown.out + shown.err).splitlines() if line.startswith("# ")]
        assert all(re.search("[\u4e00-\u9fff]", line) for line in heads), heads
        assert "没有服务器应答" in shown.err
        assert (f"安装命令：`{client.install}`" in shown.err) == bool(client.install)


def test_a_short_context_is_told_for_agents():
    for context, told in ((4096, True), (131_072, False), (None, False)):
        english, chinese = short_context(ServerAddress("http://h", "m5", context))
        assert ("4,096 tokens" in english) == ("4,096 个词元" in chinese) == told


@pytest.mark.parametrize(
    ("url", "variables", "told"),
    [
        ("http://127.0.0.1:1", {"http_proxy": "http://p:1"}, True),
        ("http://127.0.0.1:1", {"ALL_PROXY": "socks5://p:1"}, True),
        ("http://127.0.0.1:1", {"https_proxy": "http://p:1"}, False),
        ("http://127.0.0.1:1", {"http_proxy": "http://p:1", "no_proxy": "a,127.0.0.1"}, False),
        ("http://far:1", {"http_proxy": "http://p:1"}, False),
        ("http://127.0.0.1:1", {}, False),
    ],
)
def test_a_proxy_that_would_be_asked_for_this_machine_is_told(
    monkeypatch: pytest.MonkeyPatch, url: str, variables: dict[str, str], told: bool
):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ServerAddress(url, "m5").goes_to_proxy == told


def test_nothing_in_a_file_acts_on_the_terminal(command: Command, capsys):
    path = path_of("zed")
    path.parent.mkdir(parents=True)
    path.write_text('{\n  "theme": "x" // \x1b]0;title\x07\n}\n')
    assert command("connect", "zed", *NOWHERE, "--write", "--yes") == 0
    assert "\x1b" not in capsys.readouterr().err
    assert "\x1b]0;title\x07" in path.read_text()


def test_a_link_is_followed_and_stays_a_link(command: Command, person: Path):
    target = person / "dotfiles" / "pi.json"
    target.parent.mkdir()
    target.write_text('{\r\n\t"providers": {}\r\n}\r\n', newline="")
    path = path_of("pi")
    path.parent.mkdir(parents=True)
    path.symlink_to(target)
    assert command("connect", "pi", *NOWHERE, "--write", "--yes") == 0
    assert path.is_symlink()
    data = target.read_bytes()
    assert data.count(b"\r\n") == data.count(b"\n")
    assert b'\t\t"minicpm-mlx"' in data
    assert json.loads(data)["providers"]["minicpm-mlx"]["models"][0]["id"] == "m5"


def test_nothing_is_written_without_a_yes(
    command: Command, capsys, monkeypatch: pytest.MonkeyPatch
):
    for answer, status in (("n\n", 1), ("", 1), ("y\n", 0)):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        assert command("connect", "pi", *NOWHERE, "--write") == status
        assert path_of("pi").exists() == (status == 0)
    assert "nothing written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("emacs",), "none of the clients known here: openai-python"),
        (("cline", *NOWHERE, "--write"), "store of its own"),
        (("other", *NOWHERE, "--write"), "no one file"),
        (("pi", "--url", "http://127.0.0.1:1"), "no server answers at http://127.0.0.1:1"),
        (("pi", "--url", "ftp://h"), "--url must be the address"),
        (("pi", "--url", "http://[::"), "--url must be the address"),
        (("pi", "--url", "http://u:p@h"), "--url must be the address"),
        (("pi", *NOWHERE, "--api-key-env", "a b"), "must be the name of an environment variable"),
        (("pi", *NOWHERE, "--api-key-env", "A", "--api-key", "b"), "give one"),
        (("pi", *NOWHERE, "--yes"), "give both"),
        (("--write",), "needs the name of a client"),
    ],
)
def test_mistakes_are_told_in_one_line(command: Command, capsys, arguments, problem: str):
    assert command("connect", *arguments) == 1
    err = capsys.readouterr().err
    assert problem in err
    assert err.count("\n") == 1


def test_commands_hold_with_odd_names(command: Command, capsys, person: Path):
    assert command("connect", "claude-code", "--model", "it's", *NOWHERE[:2], "--json") == 0
    start = shlex.split(json.loads(capsys.readouterr().out)["start"])
    assert start == ["claude", "--settings", str(person / ".claude" / "minicpm-mlx.json")]
    assert command("connect", "cline", "--model", "it's", *NOWHERE[:2], "--json") == 0
    assert "it's" in shlex.split(json.loads(capsys.readouterr().out)["start"])
