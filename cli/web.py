"""`minicpm-mlx web`: the server, and its chat page opened in a browser."""

from __future__ import annotations

from dataclasses import dataclass

from . import options
from .options import flag
from .serve import ServerOptions, run


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class WebOptions:
    """Options of `web`."""

    server: ServerOptions
    no_browser: bool = flag("Only print the address; open no browser.")


@options.command(WebOptions)
def web(args: WebOptions) -> None:
    """Chat with a model in the browser, in English or Chinese. Programs are served as by `serve`.

    Only this machine can reach it unless --host says otherwise, which requires an API key.
    """
    from minicpm_mlx.server.requirements import check_packages

    check_packages(page=True)
    from minicpm_mlx.server.web.mount import mount

    run(args.server, mount=mount, ready=None if args.no_browser else _open_page)


def _open_page(url: str) -> None:
    """Opens the page, where there is a browser; the address is printed in any case."""
    import threading
    import webbrowser

    # On a thread: some browsers return only once they are closed.
    page = f"{url}/chat/"
    threading.Thread(target=webbrowser.open, args=(page,), daemon=True).start()
