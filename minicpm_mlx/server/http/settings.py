"""Settings of the operator of a server: who may send requests, and how much."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from ...errors import InvalidArgumentError

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s*@?#]+", re.IGNORECASE)
_HOST = re.compile(r"[a-z0-9_.-]+", re.IGNORECASE)


def check_key(key: str, name: str) -> None:
    """InvalidArgumentError, which calls it `name`, if `key` could not be sent in a header."""
    if not re.fullmatch(r"[!-~]+", key):
        raise InvalidArgumentError(
            f"{name} must be printable ASCII without spaces, and not empty; "
            "choose another, for example with `openssl rand -hex 16`"
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Keys, hosts, origins and limits."""

    api_key: str | None = field(default=None, repr=False)
    """Required on every route; None: no key is needed."""
    allowed_hosts: tuple[str, ...] = ()
    """Names of this server, besides localhost, the machine's own name and addresses."""
    allowed_origins: tuple[str, ...] = ()
    """Other sites whose pages may call it, such as https://example.com."""
    max_body: int = 8 * 2**20
    """Bytes of a request's body."""
    body_seconds: float = 30.0
    """A body must arrive within this time."""
    header_seconds: float = 10.0
    """A request's headers must arrive within this time."""
    max_requests: int = 512
    """Answered at a time, at most."""
    max_connections: int = 1024
    """Open at a time, at most."""
    log: Callable[[str], None] | None = None
    """Called with a line for each request, without prompts and keys."""

    def __post_init__(self) -> None:
        if self.api_key is not None:
            check_key(self.api_key, "the API key")
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise InvalidArgumentError(
                    f"allowed origin {origin!r}: expected SCHEME://HOST[:PORT] of one site, "
                    "such as https://example.com"
                )
        for host in self.allowed_hosts:
            if not _HOST.fullmatch(host):
                raise InvalidArgumentError(
                    f"allowed host {host!r}: expected a name without port, such as mac.example.com"
                )
