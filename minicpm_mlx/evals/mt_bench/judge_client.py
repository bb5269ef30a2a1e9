"""A chat model behind an address that speaks OpenAI's protocol: one message, patiently sent."""

from __future__ import annotations

import http.client
import json
import os
import random
import socket
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import urlsplit

from ...arguments import at_least_one, number, shown
from ...errors import DownloadError, InvalidArgumentError

__all__ = ["Endpoint", "key_from"]

AGAIN = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529))
"""Answers after which another try may succeed."""
NOBODY = 5
"""Tries where nobody answers: with waits of 1, 2, 4 and 8 seconds, time for a server to start."""
LONGEST_WAIT = 60.0
LARGEST = 8 << 20
"""Bytes of an answer; longer ones are no answer of a chat model."""
OWN = ("localhost", "127.0.0.1", "::1")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is sent to the address that was given and to no other."""

    def redirect_request(self, *_arguments: Any, **_more: Any) -> None:
        return None


class _Later(Exception):
    """This try failed; the next may not."""

    advice = "go on later"

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class _Nobody(_Later):
    """Nothing answers at the address, or it is none."""

    advice = "see that the url is right and its server runs, then go on"


@dataclass(frozen=True)
class Endpoint:
    """Where a chat model answers: `url` ends before /chat/completions, as in
    "https://api.openai.com/v1" or "http://localhost:8080/v1".

    InvalidArgumentError for a url that is none, or a key that would go over plain http to another
    machine.
    """

    url: str
    model: str
    key: str | None = None
    timeout: float = 600.0
    """Seconds that an answer may take."""
    attempts: int = 8
    """Tries before giving up."""
    wait: float = 1.0
    """Seconds before the second try; each later wait is twice as long, up to a minute."""
    told: Callable[[str], object] = field(default=lambda why: None, compare=False)
    """Is told, by whichever thread asks, why there is going to be another try, and when."""

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, {self.model!r})"  # the key is no one's business

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            host, _port = parts.hostname, parts.port  # the port is only read to be checked
        except ValueError:
            parts, host = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            raise InvalidArgumentError(
                f"expected a url such as https://api.openai.com/v1, got {shown(self.url)}"
            )
        if parts.username or parts.password:
            raise InvalidArgumentError("expected a url without a password; give the key apart")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise InvalidArgumentError("expected a key of one printable line; look into its file")
        if self.key and parts.scheme == "http" and host not in OWN:
            raise InvalidArgumentError(
                f"the key would go to {host} in the clear; use https, or give no key"
            )
        at_least_one("attempts", self.attempts)
        for name, seconds in (("timeout", self.timeout), ("wait", self.wait)):
            if not 0 < number(name, seconds) <= 86400:
                raise InvalidArgumentError(
                    f"{name} must be more than 0 seconds and at most a day, got {shown(seconds)}"
                )

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        """What the model says to `messages`; `options` (temperature, max_tokens) go along as is.

        Waits and asks again when the endpoint is busy, slow or out of order, as long as it says in
        Retry-After, if it does. DownloadError where it refuses, or all attempts failed, of which
        there are few where nobody answers.
        """
        body = {"model": self.model, "messages": list(messages), **options}
        data = json.dumps(body, ensure_ascii=False).encode(errors="backslashreplace")
        failed: Counter[type[_Later]] = Counter()
        while True:
            try:
                return self._ask(data)
            except _Later as error:
                failed[type(error)] += 1
                tries = failed.total()
                if tries == self.attempts or failed[_Nobody] == NOBODY:
                    raise DownloadError(
                        f"{self.url}: no answer after {tries} tries ({error}); what was done is "
                        f"kept: {error.advice}"
                    ) from None
                grown = min(LONGEST_WAIT, self.wait * 2.0 ** (tries - 1))
                wait = grown * random.uniform(0.75, 1) if error.wait is None else error.wait
                why = shorten(str(error), 60, placeholder="…")
                self.told(f"{why}, trying again in {wait:.0f} s")
                time.sleep(wait)

    def _ask(self, data: bytes) -> str:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", data, headers, method="POST"
        )
        opener = urllib.request.build_opener(_NoRedirect)
        try:
            with opener.open(request, timeout=self.timeout) as answer:
                return _content(answer.read(LARGEST + 1))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except (OSError, http.client.HTTPException) as error:  # URLError and timeouts among them
            why = getattr(error, "reason", None) or error
            if isinstance(why, ConnectionRefusedError | socket.gaierror):
                raise _Nobody((why.strerror or str(why)).lower()) from None
            raise _Later(str(why) or type(error).__name__) from None

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        try:
            said = " ".join(error.read(2000).decode(errors="replace").split())[:300]
        except (OSError, http.client.HTTPException):
            said = ""
        if self.key:  # some services say which key was wrong
            said = said.replace(self.key, "…")
        why = f"{error.code} {error.reason}: {said}".rstrip(": ")
        if error.code in AGAIN and "insufficient_quota" not in said:
            return _Later(why, _asked_wait(error.headers.get("Retry-After")))
        return DownloadError(f"{self.url}: {why}; check the url, the model's name and the key")


def key_from(variable: str = "OPENAI_API_KEY", file: str | Path | None = None) -> str | None:
    """A key: the first line of `file`, or else an environment variable; None where neither is.

    InvalidArgumentError for a file that cannot be read or holds nothing.
    """
    if file is None:
        return os.environ.get(variable, "").strip() or None
    try:
        lines = Path(file).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise InvalidArgumentError(f"{file}: expected a file with a key in it ({reason})") from None
    if len(lines) != 1:
        raise InvalidArgumentError(f"{file}: expected one key, found {len(lines)} words")
    return lines[0]


def _content(data: bytes) -> str:
    """The text in an answer's body; a model that thought and said nothing said ""."""
    try:
        if len(data) > LARGEST:
            raise ValueError
        content = json.loads(data)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _Later("expected choices with a message, got something else") from None
    if not isinstance(content, str | None):
        raise _Later("expected the message's content as text, got something else")
    return content or ""


def _asked_wait(header: str | None) -> float | None:
    """Retry-After in seconds, at most ten minutes: a number of them, or a date."""
    if not header:
        return None
    try:
        wait = float(header)
    except ValueError:
        try:
            wait = parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(max(wait, 0.0), 600.0) if wait == wait else None
