"""Copies made of models: `list` shows them and `rm` deletes them, the original gone or not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.theme import Theme

from minicpm_mlx.cli.render.texts import Texts
from minicpm_mlx.cli.render.theme import STYLES
from minicpm_mlx.loading import download, store
from minicpm_mlx.model_cards import resolve
from support.data import GOLDEN, write_tokenizer
from support.hub import COMMIT, REPO, Hub

MODEL = ("config.json", "model.safetensors")
Command = Callable[..., int]
Out = pytest.CaptureFixture[str]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MINICPM_MLX_HOME", str(folder))
    return folder


@pytest.fixture
def file(tmp_path: Path, cache: Path) -> Path:
    """A GGUF file that has a converted copy."""
    pytest.importorskip("gguf")
    from support.gguf_files import tensors, write

    (tmp_path / "own").mkdir()
    path = write(tmp_path / "own" / "small.v1.gguf", tensors())
    store.folder_of(resolve(str(path)))
    return path


def copies(command: Command, capsys: Out) -> list[dict[str, Any]]:
    assert command("list", "--json") == 0
    return [row for row in json.loads(capsys.readouterr().out) if row["kind"] != "card"]


def test_a_converted_copy_is_listed_under_its_file(
    command: Command, capsys: Out, file: Path
) -> None:
    [row] = copies(command, capsys)
    assert (row["name"], row["kind"]) == (str(file), "converted")
    assert row["kept_bytes"] == sum(f.stat().st_size for f in Path(row["folder"]).iterdir())
    assert command("list") == 0
    assert "a copy converted from a GGUF file" in " ".join(capsys.readouterr().out.split())
    assert command("show", str(file)) == 0


@pytest.mark.parametrize("named", ["absolute", "relative", "link", "folder"])
def test_the_copy_of_a_file_that_is_gone_is_listed_and_deleted(
    command: Command,
    capsys: Out,
    file: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    named: str,
) -> None:
    [folder] = cache.iterdir()
    if named == "link":  # as in the hub's cache
        link = file.parent / "link.gguf"
        link.symlink_to(file)
        (folder / store.SOURCE).write_text(json.dumps({"file": str(link)}))
        file.rename(file.with_suffix(".blob"))
        link.unlink()
        name = str(link)
    else:
        file.unlink()
        monkeypatch.chdir(file.parent)
        name = {"absolute": str(file), "relative": file.name, "folder": folder.name}[named]
    [row] = copies(command, capsys)
    assert "which is gone" in row["note"]
    assert "原文件已不在" in row["note_zh"]
    assert command("rm", name, "--yes") == 0
    assert "freed" in capsys.readouterr().out
    assert not list(cache.iterdir())


def test_a_copy_made_before_sources_were_recorded_goes_by_its_path_too(
    command: Command, file: Path, cache: Path
) -> None:
    [folder] = cache.iterdir()
    (folder / store.SOURCE).unlink()
    file.unlink()
    assert command("rm", str(file), "--yes") == 0
    assert not list(cache.iterdir())


def test_a_file_that_never_was_is_no_copy(command: Command, capsys: Out, cache: Path) -> None:
    assert command("rm", "/nowhere/none.gguf", "--yes") == 1
    assert "no folder or file /nowhere/none.gguf" in capsys.readouterr().err


def test_quantized_copies_that_no_card_has_and_unfinished_ones_are_listed(
    command: Command, capsys: Out, cache: Path
) -> None:
    kept = "minicpm-2b-dpo-4bit-g64-mixed"
    for name in (kept, "minicpm-2b-dpo-3bit-g32-mixed", ".minicpm-2b-sft-4bit-g64-mixed-partial"):
        (cache / name).mkdir(parents=True)
        (cache / name / "config.json").write_text("{}")
    (cache / "sessions").mkdir()
    assert command("list", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    found = {row["name"]: row["kind"] for row in rows if row["kind"] != "card"}
    assert found == {
        "minicpm-2b-dpo-3bit-g32-mixed": "quantized",
        ".minicpm-2b-sft-4bit-g64-mixed-partial": "unfinished",
    }
    [card] = [row for row in rows if row["name"] == "minicpm-2b-dpo"]
    assert card["folder"] == str(cache / kept)
    assert command("rm", "minicpm-2b-dpo-3bit-g32-mixed", "--yes") == 0
    assert (cache / kept).is_dir()
    assert not (cache / "minicpm-2b-dpo-3bit-g32-mixed").exists()


def test_downloaded_repositories_that_no_card_has_are_listed_and_deleted(
    command: Command, capsys: Out, cache: Path, hub_server: Hub, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path)
    model = {name: (GOLDEN / "minicpm_2b_like" / name).read_bytes() for name in MODEL}
    texts = {"tokenizer.json": (tmp_path / "tokenizer.json").read_bytes()}
    other = json.dumps({"architectures": ["BertModel"]}).encode()
    hub_server.repos |= {
        REPO: model | texts,
        "someone/bert": model | texts | {"config.json": other},
        "someone/begun": model | texts,
        "openbmb/MiniCPM5-1B": model | texts,
    }
    for repo in (REPO, f"{REPO}@{COMMIT}", "someone/bert", "openbmb/MiniCPM5-1B"):
        card = resolve(repo)
        download.fetch(str(card.repo), card.revision)
    download.fetch_texts("someone/begun")
    [row] = copies(command, capsys)
    folder = download.cached(REPO)
    assert folder is not None
    assert (row["name"], row["kind"], row["folder"]) == (REPO, "repository", str(folder))
    assert row["kept_bytes"] == sum(len(body) for body in (model | texts).values())
    assert command("list", "--here") == 0
    assert "a downloaded repository" in " ".join(capsys.readouterr().out.split())
    assert command("rm", REPO, "--yes") == 0
    assert " MB freed" in capsys.readouterr().out
    assert download.cached(REPO) is None
    assert download.cached("someone/bert") is not None
    assert copies(command, capsys) == []


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_shows_whole_names_and_sizes_in_the_user_s_language(
    command: Command, file: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    screen = Console(file=io.StringIO(), width=width, force_terminal=True, theme=Theme(STYLES))
    monkeypatch.setattr("minicpm_mlx.cli.models.manage.console", lambda **_: screen)
    monkeypatch.setattr("minicpm_mlx.cli.models.manage.Texts", lambda _: Texts("zh"))
    assert command("list", "--here") == 0
    shown = str(screen.file.getvalue())  # type: ignore[attr-defined]
    assert "…" not in shown
    assert {"kB", "MB"} & {*shown.split()}
    assert all(word in shown for word in ("名称", "下载", "本机", "内存", "说明"))
