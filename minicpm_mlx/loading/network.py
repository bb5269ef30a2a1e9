"""Settings of the network that a hub is reached with: its address, and proxies."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from importlib.util import find_spec
from urllib.parse import urlsplit

from ..errors import DownloadError, MissingPackageError

PROXIES = ("http", "https", "socks5", "socks5h")
"""Schemes of proxies that requests can pass."""


def endpoint() -> str | None:
    """The address of the hub; None: huggingface.co."""
    return os.environ.get("HF_ENDPOINT", "").strip().rstrip("/") or None


def proxies() -> dict[str, str]:
    """Addresses of proxies by the scheme they are for, as httpx reads them."""
    from urllib.request import getproxies

    named = {kind: address for kind, address in getproxies().items() if address}
    return {kind: named[kind] for kind in ("all", "https", "http") if kind in named}


_EXAMPLES = {
    "HF_ENDPOINT": "https://hf-mirror.com",
    "MODELSCOPE_ENDPOINT": "https://www.modelscope.cn",
}


def check_settings(variable: str) -> None:
    """DownloadError for an address in `variable`, or a proxy, that no request could use."""
    address = os.environ.get(variable, "").strip()
    if address and not _is_address(address, ("http", "https")):
        raise DownloadError(
            f"{variable} is {address}; expected an address such as {_EXAMPLES[variable]}"
        )
    for kind, address in proxies().items():
        name, scheme = f"{kind.upper()}_PROXY", _scheme(address)
        if not _is_address(address if scheme else f"http://{address}", PROXIES):
            raise DownloadError(
                f"{name}{f' ({scheme}…)' if scheme else ''} is no proxy that can be used; expected "
                f"{', '.join(PROXIES)}, host and port, such as socks5h://127.0.0.1:1080"
            )
        if scheme.startswith("socks") and find_spec("socksio") is None:
            raise MissingPackageError(f"{name} is a SOCKS proxy, which needs: pip install socksio")


def _scheme(address: str) -> str:
    """The beginning of an address, such as `http://`; empty where there is none."""
    scheme, mark, _ = address.partition("://")
    return scheme + mark if mark else ""


def _is_address(address: str, schemes: Collection[str]) -> bool:
    with suppress(ValueError):  # a port that is none
        parts = urlsplit(address)
        return parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    return False
