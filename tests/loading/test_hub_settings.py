"""The environment's settings of the network: proxies, and the hub's address."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest

from minicpm_mlx.errors import DownloadError, MissingPackageError
from minicpm_mlx.loading import download, network
from support.hub import REPO, Hub
from support.socks import socks_proxy

FETCHES: list[Callable[[], object]] = [
    lambda: download.fetch(REPO),
    lambda: download.remote_size(REPO),
    lambda: download.fetch_data(REPO, ["test.jsonl"]),
]


def test_downloads_pass_a_socks_proxy_which_resolves_the_name(
    hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("socksio")
    address = str(hub_server.server.server_address[0]), int(hub_server.server.server_address[1])
    with socks_proxy(address) as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid/")
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            "http://hub.invalid/{repo_id}/resolve/{revision}/{filename}",
        )
        folder = download.fetch(REPO)
    assert (folder / "model.safetensors").is_file()
    assert set(proxy.asked) == {"hub.invalid"}


@pytest.mark.parametrize("fetch", FETCHES)
@pytest.mark.parametrize(
    "address",
    ["hf-mirror.com", "https//hf-mirror.com", "http://", "ftp://hub", "https://hub:x", "/srv/hub"],
)
def test_an_address_that_is_none_is_named(
    hub_server: Hub, monkeypatch: pytest.MonkeyPatch, address: str, fetch: Callable[[], object]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(DownloadError, match=rf"^HF_ENDPOINT is {address}; expected an address"):
        fetch()


@pytest.mark.parametrize("fetch", FETCHES)
@pytest.mark.parametrize("name", ["ALL_PROXY", "https_proxy"])
@pytest.mark.parametrize(
    "address",
    [
        "socks://me:secret@127.0.0.1:1",
        "socks5h://",
        "http://h:x",
        "me:secret@h:x",
        ":::",
        "h:99999",
    ],
)
def test_a_proxy_that_cannot_be_used_is_named_without_its_password(
    hub_server: Hub,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    address: str,
    fetch: Callable[[], object],
) -> None:
    monkeypatch.setenv(name, address)
    with pytest.raises(DownloadError, match=rf"^{name.upper()} .* socks5h://127") as error:
        fetch()
    assert "secret" not in str(error.value)


def test_without_its_package_a_socks_proxy_says_what_to_install(
    hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:1080")
    monkeypatch.setattr(network, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"ALL_PROXY .* pip install socksio"):
        download.fetch(REPO)


def test_the_settings_of_the_network_do_not_matter_for_what_is_kept(
    hub_server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = download.fetch(REPO)
    monkeypatch.setenv("HF_ENDPOINT", "nowhere")
    monkeypatch.setenv("ALL_PROXY", "socks://nowhere")
    assert download.fetch(REPO) == folder


def test_the_package_for_socks_proxies_is_a_dependency() -> None:
    assert importlib.util.find_spec("socksio"), "pip install -e . brings httpx[socks]"
