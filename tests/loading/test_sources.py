"""The choice between the hub and ModelScope, and repositories that either has."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from minicpm_mlx.errors import DownloadError, InvalidArgumentError, ModelNotFoundError
from minicpm_mlx.loading import download
from minicpm_mlx.loading.download import sources
from support.hub import BASE, REPO, SAFE, WEIGHTS, Hub
from support.modelscope import ModelScope

Out = pytest.CaptureFixture[str]
THERE = "OpenBMB/tiny"
"""REPO, as ModelScope spells it."""


@pytest.fixture
def both(
    hub_server: Hub, modelscope: ModelScope, monkeypatch: pytest.MonkeyPatch
) -> tuple[Hub, ModelScope]:
    """Both servers with the same repository; no mirror is named, so that `auto` asks the hub."""
    monkeypatch.delenv("HF_ENDPOINT")
    modelscope.repos[THERE] = BASE | SAFE
    return hub_server, modelscope


@pytest.fixture
def unreachable(
    both: tuple[Hub, ModelScope], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    hub, end = both[0], threading.Event()
    with ExitStack() as stack:
        stack.callback(end.set)
        if request.param == "refused":
            hub.stop()
        elif request.param == "silent":
            hub.stalled.clear()
        elif request.param == "status":
            hub.status = 503
        else:
            address = "https://hub.invalid"
            if request.param == "handshake":
                listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
                address = f"https://127.0.0.1:{listener.getsockname()[1]}"
            elif request.param == "dropped":  # its queue is full: further ones get no answer
                listener = stack.enter_context(socket.socket())
                listener.bind(("127.0.0.1", 0))
                listener.listen(0)
                for _ in range(4):
                    waiting = stack.enter_context(socket.socket())
                    waiting.setblocking(False)
                    waiting.connect_ex(listener.getsockname())
                address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            else:
                look_up = socket.getaddrinfo

                def slow(host: Any, *arguments: Any, **named: Any) -> Any:
                    if host in ("hub.invalid", b"hub.invalid"):
                        end.wait(20)
                        raise socket.gaierror("no such name")
                    return look_up(host, *arguments, **named)

                monkeypatch.setattr(socket, "getaddrinfo", slow)
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        yield
        hub.stalled.set()


@pytest.mark.parametrize(
    "unreachable",
    [
        "refused",
        "status",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("silent", "dropped", "handshake", "name")
        ),
    ],
    indirect=True,
)
def test_auto_takes_modelscope_where_the_hub_cannot_be_reached(
    unreachable: None, both: tuple[Hub, ModelScope], capfd: Out
) -> None:
    source, failure = sources.choose()  # before what does not answer gives up
    assert source is sources.MODELSCOPE
    assert failure
    folder = download.fetch(REPO)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert folder == download.cached(REPO)
    assert folder.parents[1].name == "models--openbmb--tiny"  # as the hub spells it
    [line] = capfd.readouterr().err.splitlines()
    assert failure in line
    assert both[1].url in line
    download.remote_size(REPO)
    assert capfd.readouterr().err == ""  # said once


def test_auto_takes_the_hub_where_it_answers(both: tuple[Hub, ModelScope], capfd: Out) -> None:
    hub, modelscope = both
    assert sources.choose() == (sources.HUB, None)
    assert sources.choose() == (sources.HUB, None)
    assert hub.requests == [("HEAD", "/")]  # once in a process
    assert modelscope.cookies == []
    assert capfd.readouterr().err == ""


def test_a_mirror_is_a_choice_of_the_hub(hub_server: Hub, modelscope: ModelScope) -> None:
    assert sources.choose() == (sources.HUB, None)
    assert hub_server.requests == []
    hub_server.stop()
    with pytest.raises(DownloadError, match="could not be reached"):
        download.fetch(REPO)
    assert modelscope.cookies == []


def test_a_source_is_chosen_by_variable_argument_and_option(
    both: tuple[Hub, ModelScope], monkeypatch: pytest.MonkeyPatch, command: Callable[..., int]
) -> None:
    hub, modelscope = both
    monkeypatch.setenv("MINICPM_MLX_SOURCE", "ModelScope")
    download.remote_size(REPO)
    assert (len(hub.requests), len(modelscope.cookies)) == (0, 1)
    with download.using("hub"):
        download.remote_size(REPO)
    assert len(modelscope.cookies) == 1
    hub.requests.clear()
    monkeypatch.setenv("MINICPM_MLX_SOURCE", "hub")
    assert command("pull", REPO, "--source", "modelscope") == 0
    assert hub.requests == []
    assert os.environ["MINICPM_MLX_SOURCE"] == "hub"


def test_a_source_that_is_none_is_named(
    command: Callable[..., int], capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("generate", "-m", "demo", "-p", "x", "--source", "github") == 1
    assert "--source must be one of hub, modelscope, auto, got 'github'" in capsys.readouterr().err
    monkeypatch.setenv("MINICPM_MLX_SOURCE", "nowhere")
    with pytest.raises(InvalidArgumentError, match="MINICPM_MLX_SOURCE"):
        sources.choose()


def test_offline_forbids_both(
    both: tuple[Hub, ModelScope], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in ("auto", "modelscope", "hub"):
        with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"), download.using(source):
            download.fetch(REPO)
    assert (both[0].requests, both[1].cookies) == ([], [])


def test_with_neither_in_reach_both_are_named(both: tuple[Hub, ModelScope]) -> None:
    modelscope = both[1]
    for server in both:
        server.server.shutdown()
        server.server.server_close()
    with pytest.raises(DownloadError) as caught:
        download.fetch(REPO)
    message = str(caught.value)
    assert "\n" not in message
    assert modelscope.url in message
    assert "huggingface.co could not be reached" in message
    assert "HF_ENDPOINT can name a mirror" in message


def test_a_repository_that_one_side_lacks(both: tuple[Hub, ModelScope]) -> None:
    hub, modelscope = both
    del hub.repos[REPO]
    with pytest.raises(ModelNotFoundError, match=r"no repository.* has one of this name: --source"):
        download.fetch(REPO)
    del modelscope.repos[THERE]
    with pytest.raises(ModelNotFoundError) as caught:
        download.fetch(REPO)
    assert "--source" not in str(caught.value)
    hub.status = 503
    sources.forget()
    with pytest.raises(ModelNotFoundError, match=r"no repository OpenBMB/tiny at .*HTTP 503"):
        download.fetch(REPO)


@pytest.mark.parametrize(
    ("status", "said"), [(401, "MODELSCOPE_API_TOKEN"), (403, "refused"), (500, "HTTP 500")]
)
def test_refusals_of_modelscope_are_explained(
    status: int, said: str, both: tuple[Hub, ModelScope]
) -> None:
    both[1].status = status
    with pytest.raises(DownloadError, match=said) as caught, download.using("modelscope"):
        download.fetch(REPO)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("order", [("hub", "modelscope"), ("modelscope", "hub")])
def test_one_source_goes_on_with_what_the_other_began(
    order: tuple[str, str], both: tuple[Hub, ModelScope]
) -> None:
    hub, (first, second) = both[0], order
    with download.using(first):
        folder = download.fetch_texts(REPO)
    assert not (folder / "model.safetensors").exists()
    hub.requests.clear()
    with download.using(second):
        folder = download.fetch(REPO)
    assert download.cached(REPO) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == BASE | SAFE
    with download.using(first):
        assert download.fetch(REPO) == folder  # what is kept needs no source
    size = download.cached_size(REPO)
    assert size == sum(map(len, (BASE | SAFE).values()))  # the hub's blobs here are by sha256
    assert download.remove(REPO) == size
    assert not folder.exists()


def test_an_index_of_shards_is_read_from_modelscope(both: tuple[Hub, ModelScope]) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 99 for i in (1, 2)}
    index = b'{"weight_map": {"a": "%s", "b": "%s"}}' % tuple(n.encode() for n in shards)
    files = BASE | shards | {"model.safetensors.index.json": index}
    both[1].repos[THERE] = files
    with download.using("modelscope"):
        folder = download.fetch(REPO)
    assert {path.name for path in folder.iterdir()} == set(files)
    assert not [p for p in Path(folder.parents[1] / "blobs").iterdir() if "incomplete" in p.name]
