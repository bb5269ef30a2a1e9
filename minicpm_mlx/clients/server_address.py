"""A running server as its clients are to be told of it: address, model, context, key."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib import request
from urllib.parse import urlsplit

import httpx

from minicpm_mlx.errors import DownloadError, InvalidArgumentError

ID = "minicpm-mlx"
"""Name of the server in settings; Zed and aichat derive the variable of its key from it."""
KEY_VARIABLE = "MINICPM_MLX_API_KEY"
NO_KEY = "none"
"""Sent to a server that wants no key, by clients that cannot do without one."""
LOCAL = ("127.0.0.1", "localhost", "::1")
SECONDS = 5.0
SHORT_CONTEXT = 32_768
"""Tokens stated to clients that want a number, where the server was not there to tell."""


@dataclass(frozen=True)
class ServerAddress:
    """A server and one of its models."""

    url: str
    """Without /v1 and without a slash at the end."""
    model: str
    context: int | None = None
    """Tokens of a prompt and its reply together, as the server has it."""
    key_variable: str | None = None
    """Environment variable that holds the key; None where no key is needed."""
    key: str | None = None
    """The key itself, where it is to be written into settings."""
    answered: bool = True
    """Whether the server was there to be asked."""

    @property
    def openai(self) -> str:
        """Base address of the OpenAI API."""
        return f"{self.url}/v1"

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def is_local(self) -> bool:
        """Whether it runs on this machine."""
        return self.host in LOCAL

    @property
    def goes_to_proxy(self) -> bool:
        """Whether clients that follow the variables of the shell ask a proxy for this machine."""
        proxies = request.getproxies_environment()
        used = urlsplit(self.url).scheme in proxies or "all" in proxies
        return self.is_local and used and not request.proxy_bypass(self.host)

    @property
    def window(self) -> int:
        """Context in tokens, for clients that must know one."""
        return self.context or SHORT_CONTEXT

    @property
    def reply(self) -> int:
        """Tokens of a reply, for clients that reserve room for them."""
        return max(min(self.window // 4, 8192), 1)

    def secret(self, refer: Callable[[str], str]) -> str:
        """The key, the client's way to refer to its variable, or a stand-in."""
        if self.key is not None:
            return self.key
        return refer(self.key_variable) if self.key_variable else NO_KEY


def find_server(
    url: str, *, model: str | None = None, key: str | None = None, variable: str | None = None
) -> ServerAddress:
    """Asks the server at `url` which models it has, and how long their context is.

    Where it does not answer, `model` is taken as it is. `variable` names the environment variable
    with its key, by default MINICPM_MLX_API_KEY if that is set or the server wants one.
    """
    url = _base(url)
    if variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise InvalidArgumentError(
            f"must be the name of an environment variable, got {variable!r}; --api-key takes the "
            "key itself",
            field="--api-key-env",
        )
    if variable is None and key is None and os.environ.get(KEY_VARIABLE):
        variable = KEY_VARIABLE
    sent = key or os.environ.get(variable or KEY_VARIABLE)
    try:
        models = _models(url, sent)
    except DownloadError:
        if model is None:
            raise
        return ServerAddress(url, model, None, variable, key, answered=False)
    if model is None:
        model = next(iter(models))
    elif model not in models:
        raise InvalidArgumentError(
            f"{model} is not served at {url}; it serves {', '.join(models)}", field="--model"
        )
    return ServerAddress(url, model, models[model], variable, key)


def _base(url: str) -> str:
    try:
        parts = urlsplit(url)
        more = parts.username or parts.query or parts.fragment or parts.port == 0
        wrong = bool(parts.scheme not in ("http", "https") or not parts.hostname or more)
    except ValueError:
        wrong = True
    if wrong or not url.isprintable() or " " in url:
        raise InvalidArgumentError(
            f"must be the address that `serve` prints, as http://127.0.0.1:8080, got {url!r}",
            field="--url",
        )
    return re.sub(r"(/v1)?/*$", "", url)


def _models(url: str, key: str | None) -> dict[str, int | None]:
    """Context length of each model by name."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    local = urlsplit(url).hostname in LOCAL
    verify = not local or url.startswith("https:")  # certificates take 0.2 s to load
    try:
        with httpx.Client(timeout=SECONDS, trust_env=not local, verify=verify) as client:
            response = client.get(f"{url}/v1/models", headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
        raise DownloadError(
            f"no server answers at {url} ({_reason(error)}); start it with `minicpm-mlx serve`, "
            "give its address with --url, or name the model with --model"
        ) from None
    if response.status_code in (401, 403):
        raise InvalidArgumentError(
            f"the server at {url} wants its API key; set {KEY_VARIABLE}, or name the variable that "
            "holds it with --api-key-env"
        )
    try:
        found: Any = response.json()["data"]
        models = {str(row["id"]): _count(row.get("max_model_len")) for row in found}
    except (ValueError, KeyError, TypeError, AttributeError):
        models = {}
    if not models:
        raise InvalidArgumentError(
            f"{url}/v1/models lists no model (status {response.status_code}); give the address "
            "that `minicpm-mlx serve` prints with --url"
        )
    return models


def _count(value: object) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return int(str(value)) if whole else None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
