"""A client of an OpenAI-compatible chat endpoint, with retries."""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import urlsplit

from ...arguments import check_limits, limited, shown
from ...errors import DownloadError, InvalidArgumentError

RETRIED = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529))
"""HTTP statuses after which another attempt may succeed."""
UNREACHABLE_ATTEMPTS = 5
"""Attempts at an unreachable address: with waits of 1, 2, 4 and 8 s, time for a server to start."""
LONGEST_WAIT = 60.0
"""Seconds between attempts."""
LARGEST = 8 << 20
"""Bytes of a reply; a chat model sends none as long."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: a key goes to the given address and no other."""

    def redirect_request(self, *_arguments: Any, **_more: Any) -> None:
        return None


class _RetryableError(Exception):
    """This attempt failed; the next may succeed."""

    advice = "try again later"

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _UnreachableError(_RetryableError):
    """No server listens at the address, or the host is unknown."""

    advice = "check that the url is right and its server runs, then try again"


@dataclass(frozen=True)
class Endpoint:
    """A chat model's endpoint.

    `url` ends before /chat/completions, as in "https://api.openai.com/v1" or
    "http://localhost:8080/v1". InvalidArgumentError for an invalid url, or a key that would go
    over plain http to another machine.
    """

    url: str
    model: str
    key: str | None = None
    timeout: float = limited(600.0, above=0, most=86400)
    """Seconds to wait for a reply."""
    attempts: int = limited(8, whole=True, least=1)
    """Attempts before giving up."""
    wait: float = limited(1.0, above=0, most=86400)
    """Seconds before the second attempt; each later wait is twice as long, up to a minute."""
    on_retry: Callable[[str], object] = field(default=lambda reason: None, compare=False)
    """Called with the reason of another attempt and its wait, in the thread of the request."""

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.model!r})"  # without the key

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            host, _port = parts.hostname, parts.port  # reading the port checks it
        except ValueError:
            parts, host = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            raise InvalidArgumentError(
                f"expected a url such as https://api.openai.com/v1, got {shown(self.url)}"
            )
        if parts.username or parts.password:
            raise InvalidArgumentError("expected a url without a password; give the key separately")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise InvalidArgumentError("expected a key of one printable line; check its file")
        if self.key and parts.scheme == "http" and host not in LOCAL_HOSTS:
            raise InvalidArgumentError(
                f"the key would be sent to {host} unencrypted; use https, or give no key"
            )
        check_limits(self)

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        """The model's reply to `messages`; sends `options` (temperature, max_tokens) unchanged.

        Tries again when the endpoint is busy, slow or out of order, after the wait of its
        Retry-After if it has one. DownloadError where it refuses, or all attempts failed; an
        unreachable address gets fewer of them.
        """
        body = {"model": self.model, "messages": list(messages), **options}
        data = json.dumps(body, ensure_ascii=False).encode(errors="backslashreplace")
        failed = unreachable = 0
        while True:
            try:
                return self._send(data)
            except _RetryableError as error:
                failed += 1
                unreachable += isinstance(error, _UnreachableError)
                if failed == self.attempts or unreachable == UNREACHABLE_ATTEMPTS:
                    raise DownloadError(
                        f"{self.url}: no answer after {failed} tries ({error}); finished work is "
                        f"kept: {error.advice}"
                    ) from None
                wait = error.wait
                if wait is None:
                    wait = min(LONGEST_WAIT, self.wait * 2.0 ** (failed - 1))
                    wait *= random.uniform(0.75, 1)  # so that workers do not retry in step
                reason = shorten(str(error), 60, placeholder="…")
                self.on_retry(f"{reason}, trying again in {wait:.0f} s")
                time.sleep(wait)

    def _send(self, data: bytes) -> str:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", data, headers, method="POST"
        )
        opener = urllib.request.build_opener(_NoRedirect)
        try:
            with opener.open(request, timeout=self.timeout) as response:
                return _parse_content(response.read(LARGEST + 1))
        except urllib.error.HTTPError as error:
            with error:
                raise self._http_error(error) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts among them
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, ConnectionRefusedError | socket.gaierror):
                raise _UnreachableError((reason.strerror or str(reason)).lower()) from None
            raise _RetryableError(str(reason) or type(error).__name__) from None

    def _http_error(self, error: urllib.error.HTTPError) -> Exception:
        try:
            body = " ".join(error.read(2000).decode(errors="replace").split())[:300]
        except (OSError, http.client.HTTPException):
            body = ""
        if self.key:  # some services quote the wrong key
            body = body.replace(self.key, "…")
        message = f"{error.code} {error.reason}: {body}".rstrip(": ")
        if error.code in RETRIED and "insufficient_quota" not in body:
            return _RetryableError(message, _parse_retry_after(error.headers.get("Retry-After")))
        return DownloadError(f"{self.url}: {message}; check the url, the model's name and the key")


def key_from(variable: str = "OPENAI_API_KEY", file: str | Path | None = None) -> str | None:
    """The key in `file`, else in an environment variable; None where neither has one.

    InvalidArgumentError for a file that cannot be read or holds no key.
    """
    if file is None:
        return os.environ.get(variable, "").strip() or None
    try:
        words = Path(file).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise InvalidArgumentError(f"{file}: expected a file with a key in it ({reason})") from None
    if len(words) != 1:
        raise InvalidArgumentError(f"{file}: expected one key, found {len(words)} words")
    return words[0]


def _parse_content(data: bytes) -> str:
    """The text of a response; "" where the model thought and replied nothing."""
    try:
        if len(data) > LARGEST:
            raise ValueError
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _RetryableError("expected choices with a message, got something else") from None
    if not isinstance(content, str | None):
        raise _RetryableError("expected the message's content as text, got something else")
    return content or ""


def _parse_retry_after(header: str | None) -> float | None:
    """Retry-After, a number of seconds or a date, in seconds; at most ten minutes."""
    if not header:
        return None
    try:
        wait = float(header)
    except ValueError:
        try:
            wait = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(max(wait, 0.0), 600.0) if not math.isnan(wait) else None
