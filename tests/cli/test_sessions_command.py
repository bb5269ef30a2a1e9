"""`minicpm-mlx sessions`: lists, shows, exports and deletes what chats have saved."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minicpm_mlx.lm import sessions

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Run:
    """Runs `minicpm-mlx sessions ...` on a home with two sessions and a damaged one."""
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    folder = sessions.directory()
    folder.mkdir(parents=True)
    for name, question in (("first", "What?\nThat."), ("旅行 two", "去哪\x1b[31m里")):
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "Well."},
        ]
        raw: dict[str, Any] = {"format": 1, "model": "demo", "identity": "", "updated": ""}
        text = json.dumps(raw | {"messages": messages, "system": "Be brief."})
        (folder / f"{name}.json").write_text(text)
    (folder / "torn.json").write_text("{")
    sessions.cache_path("first").write_bytes(b"x" * 2_500_000)

    def call(*arguments: str, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        status = command("sessions", *arguments)
        return status, *capsys.readouterr()

    return call


def test_the_list_has_sizes_and_where_the_files_are(run: Run) -> None:
    status, out, err = run()
    assert status == 0
    header, *rows = out.splitlines()
    assert header.split() == ["name", "saved", "messages", "size", "cache", "first", "question"]
    by_name = {row[:8].strip(): row for row in rows}
    assert by_name.keys() == {"first", "旅行 two", "torn"}
    assert " 2  " in by_name["first"]
    assert "2.5 MB  What?  " in by_name["first"]
    assert "去哪[31m里" in by_name["旅行 two"]
    assert "cannot be read" in by_name["torn"]
    assert str(sessions.directory()) in err
    assert "KV caches: 2.5 MB of at most 4 GB" in err


def test_the_list_as_json_is_one_array(run: Run) -> None:
    status, out, err = run("--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert (status, err, out.count("\n")) == (0, "", 1)
    first = rows["first"]
    assert list(first) == [
        "name",
        "title",
        "messages",
        "model",
        "adapter",
        "saved",
        "bytes",
        "cache_bytes",
        "problem",
    ]
    assert (first["title"], first["messages"], first["model"]) == ("What?", 2, "demo")
    assert first["bytes"] == sessions.path_of("first").stat().st_size
    assert (first["cache_bytes"], first["problem"]) == (2_500_000, None)
    assert "cannot be read" in rows["torn"]["problem"]


def test_no_sessions_are_an_empty_list(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINICPM_MLX_HOME", "elsewhere")
    assert run("--json") == (0, "[]\n", "")
    assert run()[:2] == (0, "")


def test_a_conversation_is_shown(run: Run) -> None:
    status, out, err = run("show", "first")
    assert (status, err) == (0, "")
    assert out == (
        "# first\n\n*demo*\n\n> Be brief.\n\n**You**\n\nWhat?\nThat.\n\n**demo**\n\nWell.\n"
    )
    assert "\x1b" not in run("show", "旅行 two")[1]
    raw = json.loads(run("show", "旅行 two", "--json")[1])
    assert raw["messages"][0]["content"] == "去哪\x1b[31m里"


def test_a_conversation_is_exported_once(run: Run, tmp_path: Path) -> None:
    assert run("export", "first", "talk.md")[:2] == (0, "talk.md\n")
    assert (tmp_path / "talk.md").read_text().startswith("# talk\n")
    status, _, err = run("export", "first", "talk.md")
    assert (status, err) == (1, "minicpm-mlx: 'talk.md' exists; --force replaces it\n")
    assert run("export", "旅行 two", "talk.md", "-f")[0] == 0
    assert "去哪" in (tmp_path / "talk.md").read_text()
    assert run("export", "first", "talk.json")[0] == 0
    sessions.path_of("again").write_text((tmp_path / "talk.json").read_text())
    assert sessions.load("again").messages == sessions.load("first").messages
    status, _, err = run("export", "first", "talk.pdf")
    assert (status, err.count("\n")) == (1, 1)
    assert "expected a name that ends in .md or .json" in err
    assert run("export", "first", "missing/talk.md")[0] == 1


def test_sessions_are_deleted_with_their_caches(run: Run) -> None:
    status, out, err = run("delete", "first", "torn", typed="n\n")
    assert (status, out, err) == (1, "", "nothing deleted\n")
    status, _, err = run("delete", "first")
    assert status == 1
    assert "nobody to ask" in err
    assert run("delete", "first", "torn", typed="y\n")[0] == 0
    assert sessions.names() == ["旅行 two"]
    assert sessions.cache_sizes() == {}


def test_caches_alone_are_deleted(run: Run) -> None:
    sessions.cache_path("gone").write_bytes(b"x" * 1000)
    assert run("delete", "--cache", "first", "-y") == (0, "2.5 MB freed\n", "")
    assert run("delete", "--cache", "-y") == (0, "1 kB freed\n", "")
    assert len(sessions.names()) == 3


@pytest.mark.parametrize("verb", ["show", "export", "delete"])
@pytest.mark.parametrize(
    "name", ["../first", "/etc/passwd", "a/../first", "..", "x\0y", "first.", ""]
)
def test_a_name_that_is_a_path_is_refused(run: Run, verb: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "home" / "first.json").write_text("{}")
    rest = ("out.md",) if verb == "export" else ("-y",) if verb == "delete" else ()
    status, out, err = run(verb, name, *rest)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "a session's name is" in err
    assert (tmp_path / "home" / "first.json").exists()


def test_a_session_that_is_not_there_is_named_with_the_nearest(run: Run) -> None:
    for verb in (("show", "fist"), ("delete", "fist", "torn", "-y")):
        status, _, err = run(*verb)
        assert status == 1
        assert "the nearest are 'first'" in err
    assert len(sessions.names()) == 3
