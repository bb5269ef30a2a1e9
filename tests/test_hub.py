import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from minicpm_mlx.errors import DownloadError, ModelNotFoundError
from minicpm_mlx.loading import download

REPO = "openbmb/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 400
BASE = {
    "config.json": b'{"vocab_size": 8}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b'{"a": 1}',
    "special_tokens_map.json": b'{"b": 1}',
}
CLUTTER = {
    "README.md": b"# tiny",
    "modeling_minicpm.py": b"import os",
    "tokenizer.py": b"import sys",
    "training_args.bin": b"\0" * 9,
    "flax_model.msgpack": b"\1" * 9,
    "onnx/model.onnx": b"\2" * 9,
    "original/model.safetensors": b"\3" * 9,
}
SAFE = {"model.safetensors": WEIGHTS}
BIN = {"pytorch_model.bin": WEIGHTS[::-1]}


class Hub:
    """As much of a hub as huggingface_hub asks for, on 127.0.0.1, with faults to switch on."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.refuse: dict[str, tuple[int, str]] = {}  # repo -> status, X-Error-Code
        self.cut: list[int] = []  # bytes after which the next weight transfers break off
        self.starts: list[int] = []  # where each weight transfer began
        self.broken = False  # answer 503 to weight transfers, once `cut` is used up
        self.html = False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def got(self) -> list[str]:
        """The files whose bytes were asked for."""
        return sorted(
            path.rpartition("/")[2]
            for verb, path in self.requests
            if verb == "GET" and "/resolve/" in path
        )

    def handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def reply(self, status: int, body: bytes, kind: str, **headers: str) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                hub.requests.append((self.command, path))
                if hub.html:
                    return self.reply(200, b"<html>please log in</html>", "text/html")
                api = path.startswith("/api/models/")
                parts = path.removeprefix("/api/models").split("/")
                repo, files = "/".join(parts[1:3]), hub.repos.get("/".join(parts[1:3]))
                status, code = hub.refuse.get(
                    repo, (401, "RepoNotFound") if files is None else (0, "")
                )
                if status or files is None:
                    return self.reply(status, b"{}", "application/json", X_Error_Code=code)
                if parts[4] not in ("main", COMMIT):
                    return self.reply(
                        404, b"{}", "application/json", X_Error_Code="RevisionNotFound"
                    )
                if api:
                    body = listing(repo, files) if parts[3] == "revision" else tree(files)
                    return self.reply(200, json.dumps(body).encode(), "application/json")
                return self.send_file(files, "/".join(parts[5:]))

            def send_file(self, files: dict[str, bytes], name: str) -> None:
                body = files[name]
                start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
                weights = self.command == "GET" and name.endswith((".bin", ".safetensors"))
                hub.starts += [start] if weights else []
                if weights and hub.broken and not hub.cut:
                    return self.reply(503, b"", "text/plain")
                self.send_response(206 if start else 200)
                self.send_header("ETag", f'"{etag(body)}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(
                        body[start : start + hub.cut.pop(0)]
                        if weights and hub.cut
                        else body[start:]
                    )
                return None

        return Handler


def etag(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def listing(repo: str, files: dict[str, bytes]) -> dict[str, Any]:
    return {
        "id": repo,
        "sha": COMMIT,
        "siblings": [{"rfilename": n, "size": len(b), "blobId": etag(b)} for n, b in files.items()],
    }


def tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [{"type": "file", "path": n, "size": len(b), "oid": etag(b)} for n, b in files.items()]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants, file_download, utils
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    hub = Hub()
    hub.repos[REPO] = BASE | CLUTTER | SAFE
    for name in ("HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    # What huggingface_hub read from the environment when it was imported.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # its pauses between attempts
    disable_progress_bars()
    yield hub
    enable_progress_bars()
    if hub.thread.is_alive():
        hub.stop()
    getattr(utils, "close_session", lambda: None)()


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def test_only_the_needed_files_are_downloaded(server: Hub) -> None:
    folder = download.fetch(REPO)
    assert names(folder) == set(BASE | SAFE)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert server.got() == sorted(BASE | SAFE)
    assert {path.split("/")[1] for _, path in server.requests} == {"api", "openbmb"}
    assert (
        download.cached_size(REPO)
        == download.remote_size(REPO)
        == sum(map(len, (BASE | SAFE).values()))
    )


def test_a_repository_with_bin_weights_alone(server: Hub) -> None:
    server.repos[REPO] = BASE | CLUTTER | BIN
    assert names(download.fetch(REPO)) == set(BASE | BIN)


def test_of_both_formats_safetensors_are_taken(server: Hub) -> None:
    server.repos[REPO] = BASE | SAFE | BIN
    assert names(download.fetch(REPO)) == set(BASE | SAFE)


@pytest.mark.parametrize(("stem", "suffix"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_shards_come_with_their_index_and_all_must_be_kept(
    server: Hub, stem: str, suffix: str
) -> None:
    shards = {f"{stem}-0000{i}-of-00002.{suffix}": bytes([i]) * 99 for i in (1, 2)}
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    sharded = shards | {f"{stem}.{suffix}.index.json": json.dumps(index).encode()}
    server.repos[REPO] = BASE | CLUTTER | sharded
    folder = download.fetch(REPO)
    assert names(folder) == set(BASE | sharded)
    (folder / min(shards)).resolve().unlink()
    assert download.cached(REPO) is None
    assert download.fetch(REPO) == folder
    assert server.got().count(min(shards)) == 2
    assert server.got().count(max(shards)) == 1


@pytest.mark.parametrize(
    ("found", "ignored"),
    [
        ("weights.00.safetensors", "adapter_model.safetensors a.safetensors x.bin"),
        ("weights.00.safetensors weights.01.safetensors", "pytorch_model.bin"),
        ("model.safetensors", "model-00001-of-00001.safetensors model.safetensors.index.json"),
        ("model.safetensors model.safetensors.index.json", "consolidated.safetensors"),
        ("pytorch_model.bin", "adapter_model.safetensors"),
        ("", "adapter_model.safetensors training_args.bin optimizer.bin"),
    ],
)
def test_one_set_of_weights_is_chosen(found: str, ignored: str) -> None:
    assert download._weight_files(f"{found} {ignored}".split()) == found.split()


def test_weights_of_another_name_are_fetched_when_named(server: Hub) -> None:
    steps = {f"pytorch_model.{step}": bytes([step]) * 99 for step in (10, 20)}
    server.repos[REPO] = BASE | steps
    folder = download.fetch(REPO, weights="pytorch_model.20")
    assert names(folder) == set(BASE) | {"pytorch_model.20"}
    assert download.cached(REPO, weights="pytorch_model.20") == folder
    assert download.cached(REPO, weights="pytorch_model.10") is None


def test_what_is_kept_is_returned_without_any_network(server: Hub) -> None:
    assert download.cached(REPO) is None
    folder = download.fetch(REPO)
    server.stop()
    assert download.cached(REPO) == download.cached(REPO, COMMIT) == download.fetch(REPO) == folder
    assert download.cached(REPO, "other") is download.cached(REPO, "../refs") is None


def test_a_newer_version_is_asked_for_on_request(server: Hub) -> None:
    download.fetch(REPO)
    asked = len(server.requests)
    download.fetch(REPO, offline_ok=False)
    assert len(server.requests) > asked
    assert server.got() == sorted(BASE | SAFE)


def test_offline_with_nothing_kept_says_so(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE") as caught:
        download.fetch(REPO)
    one_line(caught)
    assert server.requests == []


def test_a_gated_repository_names_the_licence_and_the_login(server: Hub) -> None:
    server.refuse[REPO] = (401, "GatedRepo")
    with pytest.raises(DownloadError, match="accept its licence") as caught:
        download.fetch(REPO)
    assert f"{server.url}/{REPO} and run `hf auth login`" in one_line(caught)


@pytest.mark.parametrize("refusal", [(401, "RepoNotFound"), (404, "RepoNotFound"), (404, "")])
def test_a_missing_repository_is_not_found(server: Hub, refusal: tuple[int, str]) -> None:
    server.refuse[REPO] = refusal
    with pytest.raises(ModelNotFoundError, match=f"no repository {REPO}") as caught:
        download.fetch(REPO)
    one_line(caught)


def test_a_malformed_name_is_not_found(server: Hub) -> None:
    with pytest.raises(ModelNotFoundError, match="no repository") as caught:
        download.fetch("a--b/..c")
    one_line(caught)


def test_a_missing_revision_is_named(server: Hub) -> None:
    with pytest.raises(ModelNotFoundError, match="no revision 'v9'") as caught:
        download.fetch(REPO, "v9")
    one_line(caught)


@pytest.mark.parametrize(("status", "said"), [(403, "hf auth login"), (500, "HTTP 500")])
def test_other_refusals_say_the_status(server: Hub, status: int, said: str) -> None:
    server.refuse[REPO] = (status, "")
    with pytest.raises(DownloadError, match=said) as caught:
        download.fetch(REPO)
    one_line(caught)


def test_a_repository_without_weights_is_refused_before_any_download(server: Hub) -> None:
    server.repos[REPO] = BASE | CLUTTER | {"model.gguf": b"GGUF"}
    with pytest.raises(
        DownloadError, match=r"found no weights.*model\.gguf can be loaded once it is here"
    ) as caught:
        download.fetch(REPO)
    one_line(caught)
    assert server.got() == []


def test_a_disk_too_small_is_refused_before_any_download(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repos[REPO] = BASE | {"model.safetensors": bytes(30_000_000)}
    usage = type(shutil.disk_usage("/"))(0, 0, 20_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"expected 0\.03 GB of free disk, found 0\.02 GB"):
        download.fetch(REPO)
    assert server.got() == []


def test_what_is_already_there_needs_no_disk(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download.fetch(REPO)
    (folder / "config.json").resolve().unlink()
    usage = type(shutil.disk_usage("/"))(0, 0, len(WEIGHTS) // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert download.fetch(REPO) == folder


def test_a_cut_transfer_resumes_where_it_stopped(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # of 10 MB
    server.cut = [len(WEIGHTS) // 2]
    with suppress(DownloadError):  # huggingface_hub resumes at once, before 1.0 in the next call
        download.fetch(REPO)
    assert (download.fetch(REPO) / "model.safetensors").read_bytes() == WEIGHTS
    assert server.starts == [0, len(WEIGHTS) // 2]


def test_a_broken_transfer_fails_and_the_next_one_completes(server: Hub) -> None:
    server.cut, server.broken = [len(WEIGHTS) // 2], True
    with pytest.raises(DownloadError) as caught:
        download.fetch(REPO)
    one_line(caught)
    assert download.cached(REPO) is None
    server.broken = False
    before = len(server.got())
    assert (download.fetch(REPO) / "model.safetensors").read_bytes() == WEIGHTS
    again = sorted(server.got())
    assert again.count("config.json") == 1
    assert len(again) == before + 1  # the weights alone


def test_a_full_disk_during_the_download_says_so(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(DownloadError, match="filled up") as caught:
        download.fetch(REPO)
    one_line(caught)


def test_no_network_mentions_a_mirror_only_where_none_is_set(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.stop()
    with pytest.raises(DownloadError, match="could not be reached") as caught:
        download.fetch(REPO)
    assert "mirror" not in one_line(caught)
    monkeypatch.delenv("HF_ENDPOINT")  # constants.ENDPOINT still names the stopped server
    with pytest.raises(DownloadError, match="HF_ENDPOINT can name a mirror") as caught:
        download.fetch(REPO)
    one_line(caught)


def test_a_login_page_is_not_taken_for_a_hub(server: Hub) -> None:
    server.html = True
    with pytest.raises(DownloadError, match="does not answer as a hub") as caught:
        download.fetch(REPO)
    one_line(caught)


def test_remove_frees_what_was_kept(server: Hub, tmp_path: Path) -> None:
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


def test_remove_also_frees_an_unfinished_download(server: Hub, tmp_path: Path) -> None:
    blobs = tmp_path / "hub" / "models--openbmb--tiny" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.incomplete").write_bytes(b"12345")
    assert download.remove(REPO) == 5
    assert not blobs.exists()


def test_progress_off_is_silent_and_leaves_the_setting_alone(
    server: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

    enable_progress_bars()
    download.fetch(REPO, progress=False)
    assert capfd.readouterr() == ("", "")
    assert not are_progress_bars_disabled()


def test_the_environment_alone_decides_endpoint_and_cache(server: Hub, tmp_path: Path) -> None:
    code = f"from minicpm_mlx.loading import download; print(download.fetch({REPO!r}))"
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    for name in ("HF_HUB_CACHE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE"):
        environment.pop(name, None)

    def run(**more: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment | more, capture_output=True, text=True)

    assert "HF_HUB_OFFLINE" in run(HF_HUB_OFFLINE="1").stderr.splitlines()[-1]
    assert server.requests == []
    done = run()
    assert (
        Path(done.stdout.strip()) == tmp_path / "home/hub/models--openbmb--tiny/snapshots" / COMMIT
    )
    assert "agent" not in str(server.requests)  # no phoning home
    assert run(HF_HUB_OFFLINE="1").stdout == done.stdout
