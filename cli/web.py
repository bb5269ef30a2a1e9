"""`minicpm-mlx web`: the server, and its chat page opened in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options, serve

NoBrowser = Annotated[
    bool, typer.Option("--no-browser", help="Only say where the page is; open nothing.")
]


def web(
    model: options.Model = options.DEFAULT_MODEL,
    host: serve.Host = "127.0.0.1",
    port: serve.Port = 8080,
    no_browser: NoBrowser = False,
    adapter: serve.Adapters = None,
    api_key: serve.Key = None,
    api_key_file: serve.KeyFile = None,
    max_concurrency: serve.Concurrency = None,
    queue: serve.Queue = None,
    timeout: serve.Timeout = None,
    max_tokens: serve.MaxTokens = None,
    cache_memory: serve.CacheMemory = None,
    allowed_host: serve.AllowedHost = None,
    allowed_origin: serve.AllowedOrigin = None,
    tls_cert: serve.Certificate = None,
    tls_key: serve.PrivateKey = None,
    grace: serve.Grace = 10.0,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Chat with a model in the browser, in English or Chinese. Programs are served as by `serve`.

    Only this machine can reach it, unless --host says otherwise; then an API key is needed.
    """
    from minicpm_mlx.server.requirements import check_packages
    from minicpm_mlx.server.web.mount import check_gradio, mount

    check_packages()
    check_gradio()
    serve.run(
        serve.ModelOptions(
            model=model, dtype=dtype, device=device, adapters=serve.adapters_of(adapter)
        ),
        serve.Limits(
            width=max_concurrency,
            queue=queue,
            timeout=timeout,
            max_tokens=max_tokens,
            cache_memory=cache_memory,
        ),
        address=serve.address_of(host, port, tls_cert, tls_key),
        settings=serve.settings_of(api_key, api_key_file, allowed_host, allowed_origin),
        grace=grace,
        key_file=api_key_file,
        mount=mount,
        ready=None if no_browser else _show,
    )


def _show(url: str) -> None:
    """Open the page, where there is a browser; the address has been said in any case."""
    import threading
    import webbrowser

    # On a thread: some browsers come back only once they are closed.
    page = f"{url}/chat/"
    threading.Thread(target=webbrowser.open, args=(page,), daemon=True).start()
