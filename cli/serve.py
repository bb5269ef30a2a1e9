"""`minicpm-mlx serve`: a model for the clients of OpenAI, Anthropic, Ollama and SGLang."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .render.texts import Texts
from .render.theme import console

if TYPE_CHECKING:
    from minicpm_mlx.server.http.settings import Settings
    from minicpm_mlx.server.serve import Address, Mount

SAID = {
    "ready": ("{name} is served at {url} (Ctrl-C ends it)", "{name} 已启动：{url}（Ctrl-C 结束）"),
    "adapters": ("with adapters, by name: {names}", "适配器（按名称使用）：{names}"),
    "chat": ("to chat in a browser: {url}", "在浏览器中聊天：{url}"),
    "key": ("an API key is asked for on every route", "所有接口都需要 API 密钥"),
    "readable": (
        "{file} can be read by other users of this machine; `chmod 600 {file}` keeps it private",
        "本机其他用户可以读取 {file}；运行 `chmod 600 {file}` 可设为私有",
    ),
    "plain": (
        "other machines' requests come unencrypted; --tls-cert and --tls-key encrypt them",
        "来自其他机器的请求未加密；可用 --tls-cert 和 --tls-key 加密",
    ),
    "ending": (
        "ending: replies have {seconds:g} s to finish; a second Ctrl-C ends at once",
        "正在结束：回复还有 {seconds:g} 秒完成；再按一次 Ctrl-C 立即结束",
    ),
}
"""What is said, in English and in Chinese."""

Host = Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 is every one.")]
Port = Annotated[int, typer.Option("--port", help="Port; 0 takes one that is free.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="NAME=DIR: also served with it, as MODEL:NAME. Repeatable."),
]
Key = Annotated[
    str | None, typer.Option("--api-key", help="Wanted of every request. Others may see it: ps.")
]
KeyFile = Annotated[
    Path | None,
    typer.Option("--api-key-file", help="File with the key; or set MINICPM_MLX_API_KEY."),
]
Concurrency = Annotated[
    int | None, typer.Option("--max-concurrency", help="Replies made at once; default 16.")
]
Queue = Annotated[int | None, typer.Option("--queue", help="Requests that may wait; default 256.")]
Timeout = Annotated[
    float | None, typer.Option("--timeout", help="Seconds a request may take; default: any.")
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", help="Of a reply whose request says no number; default: any."),
]
CacheMemory = Annotated[
    float | None,
    typer.Option(
        "--cache-memory", help="GB to remember prompts; 0: none; default: a fifth of what is free."
    ),
]
AllowedHost = Annotated[
    list[str] | None,
    typer.Option("--allowed-host", help="Another name this server is called by. Repeatable."),
]
AllowedOrigin = Annotated[
    list[str] | None,
    typer.Option("--allowed-origin", help="Site whose pages may call it. Repeatable."),
]
Certificate = Annotated[
    Path | None, typer.Option("--tls-cert", help="Certificate in PEM, for https.")
]
PrivateKey = Annotated[Path | None, typer.Option("--tls-key", help="Its private key in PEM.")]
Grace = Annotated[float, typer.Option("--grace", help="Seconds replies may take at the end.")]


def serve(
    model: options.Model = options.DEFAULT_MODEL,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    adapter: Adapters = None,
    api_key: Key = None,
    api_key_file: KeyFile = None,
    max_concurrency: Concurrency = None,
    queue: Queue = None,
    timeout: Timeout = None,
    max_tokens: MaxTokens = None,
    cache_memory: CacheMemory = None,
    allowed_host: AllowedHost = None,
    allowed_origin: AllowedOrigin = None,
    tls_cert: Certificate = None,
    tls_key: PrivateKey = None,
    grace: Grace = 10.0,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Serve a model to programs, by the APIs of OpenAI, Anthropic, Ollama and SGLang.

    Only this machine can reach it, unless --host says otherwise; then an API key is needed.
    """
    from minicpm_mlx.server.requirements import check_packages

    check_packages()
    run(
        ModelOptions(model=model, dtype=dtype, device=device, adapters=adapters_of(adapter)),
        Limits(
            width=max_concurrency,
            queue=queue,
            timeout=timeout,
            max_tokens=max_tokens,
            cache_memory=cache_memory,
        ),
        address=address_of(host, port, tls_cert, tls_key),
        settings=settings_of(api_key, api_key_file, allowed_host, allowed_origin),
        grace=grace,
        key_file=api_key_file,
        mount=chat_page(),
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model that is to be served."""

    model: str
    dtype: str | None = None
    device: str | None = None
    adapters: dict[str, Path]
    """Folders by name."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much it does at once; None: the service's own default."""

    width: int | None = None
    queue: int | None = None
    timeout: float | None = None
    max_tokens: int | None = None
    cache_memory: float | None = None
    """GB."""

    def __post_init__(self) -> None:
        from minicpm_mlx.arguments import at_least_one
        from minicpm_mlx.errors import InvalidArgumentError

        for name, count in (("--max-concurrency", self.width), ("--max-tokens", self.max_tokens)):
            if count is not None:
                at_least_one(name, count)
        for name, value, least in (
            ("--queue", self.queue, 0),
            ("--cache-memory", self.cache_memory, 0),
            ("--timeout", self.timeout, 0.001),
        ):
            if value is not None and not least <= value < float("inf"):
                raise InvalidArgumentError(f"{name} must be {least:g} or more, got {value}")


def run(
    wanted: ModelOptions,
    limits: Limits,
    *,
    address: Address,
    settings: Settings,
    grace: float,
    key_file: Path | None = None,
    mount: Mount | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Load the model and serve it until a signal comes; `ready` is told the URL.

    `key_file` is where the key came from.
    """
    from minicpm_mlx.distributed import collectives
    from minicpm_mlx.server.serve import listen, serve
    from minicpm_mlx.server.service import QUEUE, WIDTH, Service

    say, err = Texts(), console(stderr=True)
    warnings = list(_warnings(address, key_file, say))
    _log_to_stderr()
    queue = QUEUE if limits.queue is None else limits.queue
    most = max(settings.max_requests, queue + (limits.width or WIDTH) + 64)
    settings = replace(settings, max_requests=most, max_connections=2 * most)
    # First, so that a port in use is known at once; of several ranks one is asked.
    sockets = listen(address, settings.api_key) if collectives.rank() == 0 else []
    try:
        lm = options.load(wanted.model, wanted.dtype, wanted.device, shard=True)
        given: dict[str, Any] = {
            "width": limits.width,
            "queue": limits.queue,
            "timeout": limits.timeout,
            "max_tokens": limits.max_tokens,
            "cache_bytes": None if limits.cache_memory is None else int(limits.cache_memory * 1e9),
        }
        how = {name: value for name, value in given.items() if value is not None}
        service = Service(lm, adapters=wanted.adapters, **how)
    except BaseException:
        for one in sockets:
            one.close()
        raise

    def announce(url: str) -> None:
        name, *others = (one.name for one in service.names)
        err.print(say.pick(*SAID["ready"]).format(name=name, url=url), style="title")
        if others:
            err.print(say.pick(*SAID["adapters"]).format(names=", ".join(others)))
        if mount is not None:
            err.print(say.pick(*SAID["chat"]).format(url=f"{url}/chat"))
        if settings.api_key is not None:
            err.print(say.pick(*SAID["key"]))
        for warning in warnings:
            err.print(warning, style="warning")
        if ready is not None:
            ready(url)

    serve(
        service,
        address=address,
        settings=settings,
        sockets=sockets,
        grace=grace,
        mount=mount,
        ready=announce,
        ending=lambda: err.print(say.pick(*SAID["ending"]).format(seconds=grace), style="quiet"),
    )


def _warnings(address: Address, key_file: Path | None, say: Texts) -> Iterator[str]:
    """What is less safe than it could be, which is said once the server runs."""
    from minicpm_mlx.server.serve import is_loopback, readable_by_others

    if not is_loopback(address.host) and address.certificate is None:
        yield say.pick(*SAID["plain"])
    if key_file is not None and readable_by_others(key_file):
        yield say.pick(*SAID["readable"]).format(file=key_file)


def adapters_of(given: Sequence[str] | None) -> dict[str, Path]:
    """NAME=DIR, each, as folders by name."""
    import re

    from minicpm_mlx.errors import InvalidArgumentError

    found: dict[str, Path] = {}
    for one in given or ():
        name, _, folder = one.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or not folder:
            raise InvalidArgumentError(
                f"--adapter {one}: expected NAME=DIR, NAME of letters, digits, '.', '_' and '-'"
            )
        if name in found or name == "latest":
            raise InvalidArgumentError(f"--adapter {one}: the name {name} is taken; give another")
        found[name] = Path(folder).expanduser()
    return found


def address_of(host: str, port: int, certificate: Path | None, private_key: Path | None) -> Address:
    """Where to listen."""
    from minicpm_mlx.server.serve import Address

    return Address(host=host, port=port, certificate=certificate, private_key=private_key)


def settings_of(
    api_key: str | None,
    api_key_file: Path | None,
    hosts: Sequence[str] | None,
    origins: Sequence[str] | None,
) -> Settings:
    """Who may ask; each request is told of on standard error."""
    from minicpm_mlx.server.http.settings import Settings
    from minicpm_mlx.server.serve import key_of

    err = console(stderr=True)
    return Settings(
        api_key=key_of(api_key, api_key_file),
        allowed_hosts=tuple(hosts or ()),
        allowed_origins=tuple(origins or ()),
        log=lambda line: err.print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}", style="quiet"),
    )


def chat_page() -> Mount | None:
    """The web page's, where what it needs is installed."""
    from minicpm_mlx.server.web.mount import available, mount

    return mount if available() else None


def _log_to_stderr() -> None:
    """Errors of the server itself, which nobody foresaw, with all that helps to find them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.ERROR)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    for name in ("minicpm_mlx.server", "uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.propagate = False
