"""Conversations and input history leave the cache folder, and none is lost on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minicpm_mlx.lm import sessions, user_data
from minicpm_mlx.model_cards import cache_dir, data_dir

Folders = tuple[Path, Path]
SESSION = {"format": 1, "model": "demo", "identity": "", "updated": ""}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """The old and the new folder of a user who sets nothing, on Linux."""
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("MINICPM_MLX_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    user_data._moved.cache_clear()
    return tmp_path / ".cache/minicpm-mlx", tmp_path / ".local/share/minicpm-mlx"


def put(folder: Path, *names: str, text: str = "Hi", at: int | None = None) -> None:
    (folder / "sessions").mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / "sessions" / f"{name}.json"
        path.write_text(json.dumps(SESSION | {"messages": [{"role": "user", "content": text}]}))
        if at is not None:
            os.utime(path, (at, at))


def titles() -> dict[str, str]:
    return {saved.name: saved.title for saved in sessions.listed()}


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_users_data_is_apart_from_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert data_dir() == Path("/home/me/.local/share/minicpm-mlx")
    monkeypatch.setenv("XDG_DATA_HOME", "/xdg")
    assert data_dir() == Path("/xdg/minicpm-mlx")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")  # is to be ignored
    assert data_dir() == Path("/home/me/.local/share/minicpm-mlx")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert data_dir() == Path("/home/me/Library/Application Support/minicpm-mlx")
    monkeypatch.setenv("MINICPM_MLX_HOME", "~/here")
    assert data_dir() == cache_dir() == Path("/home/me/here")


def test_all_but_kv_caches_is_moved_with_its_time(folders: Folders) -> None:
    old, new = folders
    put(old, "a", at=1_700_000_000)
    put(old, "b")
    (old / "sessions" / "torn.json").write_text('{"format": 1, "mess')
    (old / "sessions" / "a.safetensors").write_bytes(b"cache")
    (old / "history").write_text("# then\n+typed\n")
    assert titles() == {"b": "Hi", "a": "Hi"}
    assert sessions.load("a").written.timestamp() == 1_700_000_000
    assert left(new) == [
        "history",
        "sessions/a.json",
        "sessions/b.json",
        "sessions/torn.json",
    ]
    assert left(old) == ["sessions/a.safetensors"]
    assert sessions.cache_path("a").read_bytes() == b"cache"


def test_a_home_that_is_set_moves_nothing(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put(folders[0], "a")
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path / "own"))
    assert titles() == {}
    assert left(folders[0]) == ["sessions/a.json"]


def test_a_name_that_is_taken_by_another_conversation_gets_a_number(folders: Folders) -> None:
    old, new = folders
    put(old, "a", text="old")
    put(new, "a", text="new")
    put(old, "both")
    put(new, "both")  # moved before, and then the process was killed
    (old / "history").write_text("+old\n")
    new.joinpath("history").write_text("+new\n")
    assert titles() == {"a": "new", "a-2": "old", "both": "Hi"}
    assert left(old) == []
    assert (new / "history").read_text() == "+new\n+old\n"


@pytest.mark.parametrize("broken", ["copy2", "link"])
def test_what_cannot_be_moved_stays_where_it_is_and_is_used_there(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    old, new = folders
    put(old, "a", "b", "c")
    copied = user_data.shutil.copy2

    def full(source: Path, target: Path) -> None:
        if source.stem == "b":
            raise OSError(28, "No space left on device")
        copied(source, target)

    def no_links(*_: object) -> None:
        raise OSError(1, "Operation not permitted")  # as exFAT says

    with monkeypatch.context() as patch:
        if broken == "link":
            patch.setattr(user_data.os, "link", no_links)
        else:
            patch.setattr(user_data.shutil, "copy2", full)
        assert titles().keys() == {"a", "b", "c"}
    if broken == "copy2":
        assert left(new) == []
        user_data._moved.cache_clear()  # the next start
        assert titles().keys() == {"a", "b", "c"}
    assert left(old) == []


def test_a_new_folder_that_cannot_be_made_leaves_the_old_in_use(folders: Folders) -> None:
    old, new = folders
    put(old, "a")
    new.parent.mkdir(parents=True)
    new.write_text("a file")
    assert titles() == {"a": "Hi"}
    assert left(old) == ["sessions/a.json"]


def test_an_old_folder_that_cannot_be_changed_is_copied_once(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, _ = folders
    put(old, "a", text="old")
    (old / "history").write_text("+old\n")

    def read_only(path: Path, missing_ok: bool = False) -> None:
        if old in path.parents:
            raise OSError(30, "Read-only file system")
        os.remove(path)  # noqa: PTH107

    monkeypatch.setattr(user_data.os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(user_data.Path, "unlink", read_only)
    for text in ("old", "went on", "went on"):
        assert titles() == {"a": text}
        put(folders[1], "a", text="went on")
        user_data._moved.cache_clear()
    assert (folders[1] / "history").read_text() == "+old\n"


def test_folders_that_are_one_by_a_link_keep_their_files(folders: Folders) -> None:
    old, new = folders
    put(new, "a")
    (new / "history").write_text("+typed\n")
    old.mkdir(parents=True)
    (old / "sessions").symlink_to(new / "sessions")
    (old / "history").symlink_to(new / "history")
    assert titles() == {"a": "Hi"}
    assert left(new) == ["history", "sessions/a.json"]


def test_a_session_that_an_earlier_version_writes_meanwhile_is_moved_later(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, _ = folders
    put(old, "a", text="one")
    copied = user_data.shutil.copy2

    def and_write(source: Path, target: Path) -> None:
        copied(source, target)
        put(old, "a", text="one and two")

    with monkeypatch.context() as patch:
        patch.setattr(user_data.shutil, "copy2", and_write)
        assert titles() == {"a": "one"}
    user_data._moved.cache_clear()
    assert titles() == {"a": "one", "a-2": "one and two"}
    assert left(old) == []


def test_processes_that_start_at_once_move_each_file_once(folders: Folders) -> None:
    old, new = folders
    names = [f"s{number}" for number in range(40)]
    put(old, *names)
    (old / "history").write_text("+typed\n" * 50)
    code = "from minicpm_mlx.lm.user_data import user_data; print(user_data())"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert {process.communicate(timeout=60)[0].strip() for process in started} == {str(new)}
    assert titles().keys() == set(names)
    assert (new / "history").read_text() == "+typed\n" * 50
    assert left(old) == []
