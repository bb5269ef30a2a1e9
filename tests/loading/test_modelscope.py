"""Downloads from ModelScope: the hub's layout, continued where they broke off, and checked."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest

from minicpm_mlx.errors import DownloadError, ModelNotFoundError
from minicpm_mlx.loading.download import modelscope as source
from support.hub import Hub
from support.modelscope import ModelScope

REPO = "OpenBMB/tiny"
FILES = {
    "config.json": b"{}",
    "model.safetensors": random.Random(1).randbytes(3_000_000),
    "empty.txt": b"",
}


@pytest.fixture
def client(hub_server: Hub) -> Any:
    """The hub's own client, whose pauses between attempts are left out."""
    from huggingface_hub.utils import get_session

    return get_session()


def fetch(client: Any, tmp_path: Path, counts: list[int] | None = None) -> Path:
    folder = tmp_path / "kept"
    files = source.listing(client, REPO, "main")
    report = (counts if counts is not None else []).append
    return source.transfer(client, REPO, "main", files, [*files], folder, report)


def test_files_lie_as_the_hub_lays_them(
    client: Any, modelscope: ModelScope, tmp_path: Path
) -> None:
    modelscope.repos[REPO] = FILES
    counts: list[int] = []
    snapshot = fetch(client, tmp_path, counts)
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == FILES
    assert snapshot.parent == tmp_path / "kept" / "snapshots"
    assert (tmp_path / "kept" / "refs" / "main").read_text() == snapshot.name
    digest = hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    assert (snapshot / "model.safetensors").readlink() == Path(f"../../blobs/{digest}")
    assert sum(counts) == sum(map(len, FILES.values()))
    modelscope.starts.clear()
    assert fetch(client, tmp_path) == snapshot
    assert modelscope.starts == []  # nothing is sent twice


def test_an_interrupted_download_is_continued(
    client: Any, modelscope: ModelScope, tmp_path: Path
) -> None:
    modelscope.repos[REPO] = FILES
    cuts = sorted(random.Random(2).sample(range(1, 3_000_000), 30))
    modelscope.cut = [2, *(b - a for a, b in zip([0, *cuts], cuts, strict=False))]
    counts: list[int] = []
    snapshot = fetch(client, tmp_path, counts)
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == FILES
    assert len(modelscope.starts) == 33  # both other files once, this one 31 times
    assert sum(counts) == sum(map(len, FILES.values()))


def test_a_server_that_cannot_continue_sends_all_again(
    client: Any, modelscope: ModelScope, tmp_path: Path
) -> None:
    modelscope.repos[REPO], modelscope.ranges = FILES, False
    modelscope.cut = [2, 1_000_000]
    counts: list[int] = []
    snapshot = fetch(client, tmp_path, counts)
    assert (snapshot / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert sum(counts) == sum(map(len, FILES.values()))


@pytest.mark.parametrize("change", [{"Size": 5}, {"Sha256": "0" * 64}])
def test_wrong_contents_are_refused_and_not_kept(
    change: dict[str, Any], client: Any, modelscope: ModelScope, tmp_path: Path
) -> None:
    modelscope.repos[REPO] = FILES
    modelscope.listed["model.safetensors"] = change
    with pytest.raises(DownloadError, match=r"model\.safetensors: expected .* bytes"):
        fetch(client, tmp_path)
    assert not any("incomplete" in path.name for path in (tmp_path / "kept" / "blobs").iterdir())
    assert not (tmp_path / "kept" / "refs").exists()
    del modelscope.listed["model.safetensors"]
    assert (fetch(client, tmp_path) / "model.safetensors").is_file()


def test_a_download_that_brings_nothing_is_given_up(
    client: Any, modelscope: ModelScope, tmp_path: Path
) -> None:
    modelscope.repos[REPO] = {"model.safetensors": FILES["model.safetensors"]}
    modelscope.cut = [0] * 100
    with pytest.raises(Exception, match="peer closed connection"):
        fetch(client, tmp_path)
    assert len(modelscope.starts) == source.ATTEMPTS


def test_a_token_opens_a_private_repository(
    client: Any, modelscope: ModelScope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modelscope.repos[REPO], modelscope.token = FILES, "secret"
    with pytest.raises(Exception, match="404"):
        fetch(client, tmp_path)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "secret")
    assert (fetch(client, tmp_path) / "config.json").read_bytes() == b"{}"


def test_the_token_goes_to_modelscope_alone(
    client: Any, modelscope: ModelScope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own redirects keep it, as a private repository needs; the host of the files has none."""
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "secret")
    modelscope.repos[REPO] = {"config.json": b"{}"}
    fetch(client, tmp_path / "one")
    assert {cookie for _, cookie in modelscope.cookies} == {"m_session_id=secret"}
    other = ModelScope()
    try:
        other.repos[REPO], modelscope.storage = modelscope.repos[REPO], other.url
        fetch(client, tmp_path / "two")
    finally:
        other.stop()
    assert [(path.split("/")[1], cookie) for path, cookie in other.cookies] == [("storage", "")]


@pytest.mark.parametrize(
    "change",
    [
        {"Sha256": "../../../outside"},
        {"Sha256": "0" * 63},
        {"Sha256": None},
        {"Sha256": "/" + "0" * 63},
        {"Size": -1},
        {"Path": ".."},
        {"Path": "..\\config.json"},
        {"Path": ""},
    ],
)
def test_what_a_server_lists_is_checked_before_it_becomes_a_path(
    change: dict[str, Any], client: Any, modelscope: ModelScope, tmp_path: Path
) -> None:
    modelscope.repos[REPO] = {"config.json": b"{}"}
    modelscope.listed["config.json"] = change
    with pytest.raises(DownloadError, match=r"lists .*expected"):
        fetch(client, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("revision", ["../../outside", "/outside", "a//b", "."])
def test_a_revision_is_no_path(
    revision: str, client: Any, modelscope: ModelScope, tmp_path: Path
) -> None:
    with pytest.raises(ModelNotFoundError, match="no revision"):
        source.transfer(client, REPO, revision, {}, [], tmp_path, print)


@pytest.mark.parametrize(
    ("there", "starts"), [(FILES["model.safetensors"][:1000], [1000]), (b"wrong", [5, 0])]
)
def test_what_another_program_began_is_continued_or_begun_anew(
    there: bytes, starts: list[int], client: Any, modelscope: ModelScope, tmp_path: Path
) -> None:
    modelscope.repos[REPO] = {"model.safetensors": FILES["model.safetensors"]}
    digest = hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    (tmp_path / "kept" / "blobs").mkdir(parents=True)
    (tmp_path / "kept" / "blobs" / f"{digest}.incomplete").write_bytes(there)
    counts: list[int] = []
    snapshot = fetch(client, tmp_path, counts)
    assert (snapshot / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert modelscope.starts == starts
    assert sum(counts) == len(FILES["model.safetensors"])
