"""`minicpm-mlx serve`: a model for the clients of OpenAI, Anthropic, Ollama and SGLang."""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm_mlx.arguments import Limit
from minicpm_mlx.distributed import collectives
from minicpm_mlx.errors import FileError, InvalidArgumentError

from . import options, paths
from .options import flag, option
from .render.texts import Texts
from .render.theme import console

if TYPE_CHECKING:
    from minicpm_mlx.server.http.settings import Settings
    from minicpm_mlx.server.serve import Address, Mount
    from minicpm_mlx.server.service import Service


NOT_NEGATIVE = Limit(least=0, below=math.inf)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Limits:
    """Load that the server accepts; None: the service's own default."""

    width: int | None = option(
        "Replies generated at the same time; default 16.", "--max-concurrency", limit=options.COUNT
    )
    queue: int | None = option("Requests that may wait; default 256.", limit=NOT_NEGATIVE)
    timeout: float | None = option(
        "Seconds a request may take; default: no limit.", limit=Limit(least=0.001, below=math.inf)
    )
    max_tokens: int | None = option(
        "Longest reply if the request sets no limit; default: no limit.", limit=options.COUNT
    )
    cache_memory: float | None = option(
        "GB to cache prompts; 0: none; default: a fifth of free memory.", limit=NOT_NEGATIVE
    )

    def as_keywords(self) -> dict[str, Any]:
        """The limits that were given, as Service names them."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        if (gigabytes := values.pop("cache_memory", None)) is not None:
            values["cache_bytes"] = int(gigabytes * 1e9)
        return values


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class ServerOptions:
    """Options of `serve` and `web`."""

    model: options.BaseModel = None
    host: str = option("Address to listen on; 0.0.0.0 is all of them.", default="127.0.0.1")
    port: int = option("Port; 0 takes one that is free.", default=8080)
    adapter: list[str] | None = option(
        "NAME=DIR: also serve the model with it, as MODEL:NAME. Repeatable."
    )
    api_key: str | None = option("Key that every request must send. Other users may see it: ps.")
    api_key_file: Path | None = option(
        "File with the key; or set MINICPM_MLX_API_KEY.", check=paths.input_file
    )
    limits: Limits
    allowed_host: list[str] | None = option("Another host name of this server. Repeatable.")
    allowed_origin: list[str] | None = option("Site whose pages may call it. Repeatable.")
    allow_embedding_ids: bool = flag("Embed token ids too: they must be this model's own.")
    tls_cert: Path | None = option("Certificate in PEM, for https.", check=paths.input_file)
    tls_key: Path | None = option("Its private key in PEM.", check=paths.input_file)
    grace: float = option(
        "Seconds that replies may still take at shutdown.",
        default=10.0,
        limit=Limit(least=0, most=3600),
    )
    compute: options.Compute


@options.command(ServerOptions)
def serve(args: ServerOptions) -> None:
    """Serve a model to programs, by the APIs of OpenAI, Anthropic, Ollama and SGLang.

    Only this machine can reach it unless --host says otherwise, which requires an API key.
    """
    from minicpm_mlx.server.requirements import check_packages, has_page

    check_packages()
    if not has_page():
        run(args)
        return
    from minicpm_mlx.server.web.mount import mount

    run(args, mount=mount)


def run(
    args: ServerOptions, *, mount: Mount | None = None, ready: Callable[[str], None] | None = None
) -> None:
    """Loads the model and serves it until a signal comes; calls `ready` with the URL."""
    from minicpm_mlx.server.serve import Address, listen, serve
    from minicpm_mlx.server.service import QUEUE, WIDTH, Service

    adapters, limits = _parse_adapters(args.adapter), args.limits
    address = Address(
        host=args.host, port=args.port, certificate=args.tls_cert, private_key=args.tls_key
    )
    settings = _settings(args)
    warnings = list(_warnings(address, args.api_key_file))
    _log_to_stderr()
    model = options.choose_model(args.model, adapters.values())
    queue = QUEUE if limits.queue is None else limits.queue
    max_requests = max(settings.max_requests, queue + (limits.width or WIDTH) + 64)
    settings = replace(settings, max_requests=max_requests, max_connections=2 * max_requests)
    # First, so that a port in use is known at once; of several ranks only one listens.
    sockets = listen(address, settings.api_key) if collectives.rank() == 0 else []
    try:
        lm = options.load_model(model, args.compute, shard=True)
        service = Service(
            lm,
            adapters=adapters,
            embedding_ids=args.allow_embedding_ids,
            **limits.as_keywords(),
        )
    except BaseException:
        for socket in sockets:
            socket.close()
        raise

    def announce(url: str) -> None:
        _announce(service, url, page=mount is not None, key=settings.api_key is not None)
        for warning in warnings:
            console(stderr=True).print(warning, style="warning")
        if ready is not None:
            ready(url)

    serve(
        service,
        address=address,
        settings=settings,
        sockets=sockets,
        grace=args.grace,
        mount=mount,
        ready=announce,
        ending=lambda: console(stderr=True).print(
            Texts()("serve.ending", seconds=args.grace), style="quiet"
        ),
    )


def _announce(service: Service, url: str, *, page: bool, key: bool) -> None:
    stderr, texts = console(stderr=True), Texts()
    name, *others = (model.name for model in service.models)
    stderr.print(texts("serve.ready", name=name, url=url), style="title")
    if others:
        stderr.print(texts("serve.adapters", names=", ".join(others)))
    if page:
        stderr.print(texts("serve.page", url=f"{url}/chat"))
    if key:
        stderr.print(texts("serve.key"))


def _warnings(address: Address, key_file: Path | None) -> Iterator[str]:
    """Warnings about weak security, shown once the server runs."""
    from minicpm_mlx.server.serve import is_loopback, readable_by_others

    if not is_loopback(address.host) and address.certificate is None:
        yield Texts()("serve.plain")
    if key_file is not None and readable_by_others(key_file):
        yield Texts()("serve.readable", file=key_file)


def _parse_adapters(arguments: Sequence[str] | None) -> dict[str, Path]:
    """Folders by name, of arguments NAME=DIR."""
    adapters: dict[str, Path] = {}
    for argument in arguments or ():
        name, _, folder = argument.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or not folder:
            raise InvalidArgumentError(
                f"--adapter {argument}: expected NAME=DIR, NAME of letters, digits, '.', '_' and "
                "'-'"
            )
        if name in adapters or name == "latest":
            raise InvalidArgumentError(
                f"--adapter {argument}: the name {name} is taken; give another"
            )
        adapters[name] = Path(folder).expanduser()
    for name, path in adapters.items():
        try:
            paths.adapter_folder(path)
        except FileError as error:
            raise InvalidArgumentError(f"--adapter {name}: {error}") from None
    return adapters


def _settings(args: ServerOptions) -> Settings:
    """Settings of the HTTP layer; each request is logged to standard error."""
    from minicpm_mlx.server.http.settings import Settings
    from minicpm_mlx.server.serve import load_key

    stderr = console(stderr=True)
    return Settings(
        api_key=load_key(args.api_key, args.api_key_file),
        allowed_hosts=tuple(args.allowed_host or ()),
        allowed_origins=tuple(args.allowed_origin or ()),
        log=lambda line: stderr.print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}", style="quiet"),
    )


def _log_to_stderr() -> None:
    """Logs unexpected errors of the server with their tracebacks."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.ERROR)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    for name in ("minicpm_mlx.server", "uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.propagate = False
