import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from minicpm_mlx.errors import DownloadError, ModelNotFoundError, StorageError
from minicpm_mlx.files.weight_files import files_in
from minicpm_mlx.loading import download
from support.hub import BASE, CLUTTER, COMMIT, REPO, SAFE, WEIGHTS, Hub

BIN = {"pytorch_model.bin": WEIGHTS[::-1]}


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_only_the_needed_files_are_downloaded(hub_server: Hub) -> None:
    folder = download.fetch(REPO)
    assert names(folder) == set(BASE | SAFE)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub_server.got() == sorted(BASE | SAFE)
    assert {path.split("/")[1] for _, path in hub_server.requests} == {"api", "openbmb"}
    assert (
        download.cached_size(REPO)
        == download.remote_size(REPO)
        == sum(map(len, (BASE | SAFE).values()))
    )


def test_a_repository_with_bin_weights_alone(hub_server: Hub) -> None:
    hub_server.repos[REPO] = BASE | CLUTTER | BIN
    assert names(download.fetch(REPO)) == set(BASE | BIN)


def test_of_both_formats_safetensors_are_taken(hub_server: Hub) -> None:
    hub_server.repos[REPO] = BASE | SAFE | BIN
    assert names(download.fetch(REPO)) == set(BASE | SAFE)


@pytest.mark.parametrize(("stem", "suffix"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_shards_come_with_their_index_and_all_must_be_kept(
    hub_server: Hub, stem: str, suffix: str
) -> None:
    shards = {f"{stem}-0000{i}-of-00002.{suffix}": bytes([i]) * 99 for i in (1, 2)}
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    sharded = shards | {f"{stem}.{suffix}.index.json": json.dumps(index).encode()}
    hub_server.repos[REPO] = BASE | CLUTTER | sharded
    folder = download.fetch(REPO)
    assert names(folder) == set(BASE | sharded)
    (folder / min(shards)).resolve().unlink()
    assert download.cached(REPO) is None
    assert download.fetch(REPO) == folder
    assert hub_server.got().count(min(shards)) == 2
    assert hub_server.got().count(max(shards)) == 1


INDEX, SHARDS = (
    "model.safetensors.index.json",
    ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
)
BIN_SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


@pytest.mark.parametrize(
    ("found", "ignored", "indexed"),
    [
        ("weights.00.safetensors", "adapter_model.safetensors a.safetensors x.bin", ""),
        ("weights.00.safetensors weights.01.safetensors", "pytorch_model.bin", ""),
        ("model.safetensors", " ".join(SHARDS), " ".join(SHARDS)),
        ("model.safetensors", "consolidated.safetensors", "gone.safetensors"),
        (" ".join(SHARDS), "model-1-of-3.safetensors", " ".join(SHARDS)),
        (" ".join(SHARDS), "model-1-of-3.safetensors", ""),
        (" ".join(SHARDS), "", "model-00001-of-00003.safetensors"),
        ("a.safetensors b.safetensors", "model-1-of-2.safetensors", "a.safetensors b.safetensors"),
        ("pytorch_model.bin", "adapter_model.safetensors " + " ".join(BIN_SHARDS), ""),
        ("pytorch_model.bin", SHARDS[0], " ".join(SHARDS)),
        (" ".join(BIN_SHARDS), SHARDS[1], ""),
        ("", "adapter_model.safetensors training_args.bin optimizer.bin", ""),
    ],
)
def test_one_set_of_weights_is_chosen_in_a_folder_as_on_a_hub(
    found: str, ignored: str, indexed: str, hub_server: Hub, tmp_path: Path
) -> None:
    weight_map = {f"tensor {file}": file for file in indexed.split()}
    there = {name: name.encode() for name in f"{found} {ignored}".split()}
    if indexed:
        there[INDEX] = json.dumps({"weight_map": weight_map}).encode()
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in there.items():
        (folder / name).write_bytes(content)
    chosen = files_in(folder)
    assert list(chosen.files if chosen else ()) == found.split()
    hub_server.repos[REPO] = BASE | CLUTTER | there
    if found:
        wanted = set(BASE) | set(found.split())
        assert names(download.fetch(REPO)) - {INDEX} == wanted
        assert download.cached(REPO)


@pytest.mark.parametrize(
    ("there", "indexed", "missing"),
    [
        (SHARDS[:1], SHARDS, SHARDS[1]),
        (SHARDS[1:], (), SHARDS[0]),
        ((), SHARDS, SHARDS[0]),
        (BIN_SHARDS[1:], (), BIN_SHARDS[0]),
    ],
)
def test_a_repository_that_lacks_shards_is_refused_before_the_download(
    there: tuple[str, ...], indexed: tuple[str, ...], missing: str, hub_server: Hub
) -> None:
    hub_server.repos[REPO] = BASE | dict.fromkeys(there, b"weights")
    if indexed:
        index = {"weight_map": {name: name for name in indexed}}
        hub_server.repos[REPO][INDEX] = json.dumps(index).encode()
    with pytest.raises(DownloadError, match=f"has no file {missing}") as caught:
        download.fetch(REPO)
    one_line(caught)
    assert not {*hub_server.got()} - {INDEX}


def test_weights_of_another_name_are_fetched_when_named(hub_server: Hub) -> None:
    steps = {f"pytorch_model.{step}": bytes([step]) * 99 for step in (10, 20)}
    hub_server.repos[REPO] = BASE | steps
    folder = download.fetch(REPO, weights="pytorch_model.20")
    assert names(folder) == set(BASE) | {"pytorch_model.20"}
    assert download.cached(REPO, weights="pytorch_model.20") == folder
    assert download.cached(REPO, weights="pytorch_model.10") is None


def test_what_is_kept_is_returned_without_any_network(hub_server: Hub) -> None:
    assert download.cached(REPO) is None
    folder = download.fetch(REPO)
    hub_server.stop()
    assert download.cached(REPO) == download.cached(REPO, COMMIT) == download.fetch(REPO) == folder
    assert download.cached(REPO, "other") is download.cached(REPO, "../refs") is None


def test_a_newer_version_is_asked_for_on_request(hub_server: Hub) -> None:
    download.fetch(REPO)
    asked = len(hub_server.requests)
    download.fetch(REPO, offline_ok=False)
    assert len(hub_server.requests) > asked
    assert hub_server.got() == sorted(BASE | SAFE)


def test_offline_with_nothing_kept_says_so(
    hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE") as caught:
        download.fetch(REPO)
    one_line(caught)
    assert hub_server.requests == []


def test_a_gated_repository_names_the_licence_and_the_login(hub_server: Hub) -> None:
    hub_server.refuse[REPO] = (401, "GatedRepo")
    with pytest.raises(DownloadError, match="accept its licence") as caught:
        download.fetch(REPO)
    assert f"{hub_server.url}/{REPO} and run `hf auth login`" in one_line(caught)


@pytest.mark.parametrize("refusal", [(401, "RepoNotFound"), (404, "RepoNotFound"), (404, "")])
def test_a_missing_repository_is_not_found(hub_server: Hub, refusal: tuple[int, str]) -> None:
    hub_server.refuse[REPO] = refusal
    with pytest.raises(ModelNotFoundError, match=f"no repository {REPO}") as caught:
        download.fetch(REPO)
    one_line(caught)


def test_a_malformed_name_is_not_found(hub_server: Hub) -> None:
    with pytest.raises(ModelNotFoundError, match="no repository") as caught:
        download.fetch("a--b/..c")
    one_line(caught)


def test_a_missing_revision_is_named(hub_server: Hub) -> None:
    with pytest.raises(ModelNotFoundError, match="no revision 'v9'") as caught:
        download.fetch(REPO, "v9")
    one_line(caught)


@pytest.mark.parametrize(("status", "said"), [(403, "hf auth login"), (500, "HTTP 500")])
def test_other_refusals_say_the_status(hub_server: Hub, status: int, said: str) -> None:
    hub_server.refuse[REPO] = (status, "")
    with pytest.raises(DownloadError, match=said) as caught:
        download.fetch(REPO)
    one_line(caught)


def test_a_repository_without_weights_is_refused_before_any_download(hub_server: Hub) -> None:
    hub_server.repos[REPO] = BASE | CLUTTER | {"mmproj-F16.gguf": b"GGUF"}
    with pytest.raises(DownloadError, match="found no weights") as caught:
        download.fetch(REPO)
    one_line(caught)
    assert hub_server.got() == []


def test_a_disk_too_small_is_refused_before_any_download(
    hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_server.repos[REPO] = BASE | {"model.safetensors": bytes(30_000_000)}
    usage = type(shutil.disk_usage("/"))(0, 0, 20_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"expected 0\.03 GB of free disk, found 0\.02 GB"):
        download.fetch(REPO)
    assert hub_server.got() == []


def test_what_is_already_there_needs_no_disk(
    hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = download.fetch(REPO)
    (folder / "config.json").resolve().unlink()
    usage = type(shutil.disk_usage("/"))(0, 0, len(WEIGHTS) // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert download.fetch(REPO) == folder


def test_a_cut_transfer_resumes_where_it_stopped(
    hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # of 10 MB
    hub_server.cut = [len(WEIGHTS) // 2]
    with suppress(DownloadError):  # huggingface_hub resumes at once, before 1.0 in the next call
        download.fetch(REPO)
    assert (download.fetch(REPO) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub_server.starts == [0, len(WEIGHTS) // 2]


def test_a_broken_transfer_fails_and_the_next_one_completes(hub_server: Hub) -> None:
    hub_server.cut, hub_server.broken = [len(WEIGHTS) // 2], True
    with pytest.raises(DownloadError) as caught:
        download.fetch(REPO)
    one_line(caught)
    assert download.cached(REPO) is None
    hub_server.broken = False
    before = len(hub_server.got())
    assert (download.fetch(REPO) / "model.safetensors").read_bytes() == WEIGHTS
    again = sorted(hub_server.got())
    assert again.count("config.json") == 1
    assert len(again) == before + 1  # the weights alone


def test_a_full_disk_during_the_download_says_so(
    hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(StorageError, match="filled up") as caught:
        download.fetch(REPO)
    one_line(caught)


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "/x/hub"), OSError(30, "Read-only", "/x/y")]
)
@pytest.mark.parametrize("failing", ["HfApi.model_info", "snapshot_download"])
def test_a_cache_that_cannot_be_written_says_so(
    hub_server: Hub, monkeypatch: pytest.MonkeyPatch, failing: str, error: OSError
) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(f"huggingface_hub.{failing}", fail)
    with pytest.raises(StorageError, match=f"{error.filename}.*HF_HOME") as caught:
        download.fetch(REPO)
    one_line(caught)


def test_a_cache_that_is_no_folder_says_so(
    hub_server: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(StorageError, match=r"Not a directory.*HF_HOME"):
        download.fetch(REPO)


def test_no_network_mentions_a_mirror_only_where_none_is_set(
    hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_server.stop()
    with pytest.raises(DownloadError, match="could not be reached") as caught:
        download.fetch(REPO)
    assert "mirror" not in one_line(caught)
    monkeypatch.delenv("HF_ENDPOINT")  # constants.ENDPOINT still names the stopped server
    with pytest.raises(DownloadError, match="HF_ENDPOINT can name a mirror") as caught:
        download.fetch(REPO)
    one_line(caught)


def test_a_login_page_is_not_taken_for_a_hub(hub_server: Hub) -> None:
    hub_server.html = True
    with pytest.raises(DownloadError, match="does not answer as a hub") as caught:
        download.fetch(REPO)
    one_line(caught)


def test_remove_frees_what_was_kept(hub_server: Hub, tmp_path: Path) -> None:
    download.fetch(REPO)
    size = download.cached_size(REPO)
    assert size > len(WEIGHTS)
    assert download.remove(REPO) == size
    assert (download.cached(REPO), download.cached_size(REPO), download.remove(REPO)) == (
        None,
        0,
        0,
    )
    assert not list(tmp_path.glob("hub/models--*"))


def test_remove_leaves_another_repository_of_the_same_commit(hub_server: Hub) -> None:
    mirrors = [f"someone/mirror-{i}" for i in range(5)]
    hub_server.repos |= dict.fromkeys(mirrors, hub_server.repos[REPO])
    folders = {repo: download.fetch(repo) for repo in (REPO, *mirrors)}
    assert len({folder.name for folder in folders.values()}) == 1
    download.remove(REPO)
    assert [repo for repo in folders if download.cached(repo)] == mirrors


def test_remove_also_frees_an_unfinished_download(hub_server: Hub, tmp_path: Path) -> None:
    blobs = tmp_path / "hub" / "models--openbmb--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.incomplete").write_bytes(b"12345")
    assert download.remove(REPO) == 5
    assert not blobs.exists()


def test_progress_off_is_silent_and_leaves_the_setting_alone(
    hub_server: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

    enable_progress_bars()
    download.fetch(REPO, progress=False)
    assert capfd.readouterr() == ("", "")
    assert not are_progress_bars_disabled()


def test_the_environment_alone_decides_endpoint_and_cache(hub_server: Hub, tmp_path: Path) -> None:
    code = f"from minicpm_mlx.loading import download; print(download.fetch({REPO!r}))"
    environment = os.environ | {"HF_ENDPOINT": hub_server.url, "HF_HOME": str(tmp_path / "home")}
    for name in ("HF_HUB_CACHE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE"):
        environment.pop(name, None)

    def run(**more: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True)

    assert "HF_HUB_OFFLINE" in run(HF_HUB_OFFLINE="1").stderr.splitlines()[-1]
    assert hub_server.requests == []
    done = run()
    assert (
        Path(done.stdout.strip()) == tmp_path / "home/hub/models--openbmb--tiny/snapshots" / COMMIT
    )
    assert "agent" not in str(hub_server.requests)  # no phoning home
    assert run(HF_HUB_OFFLINE="1").stdout == done.stdout
