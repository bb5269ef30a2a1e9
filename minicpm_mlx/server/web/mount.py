"""The page's place in the server: made when it is first asked for."""

from __future__ import annotations

import asyncio
import importlib.util
from importlib import resources
from typing import TYPE_CHECKING, Any

from minicpm_mlx.errors import MissingPackageError

from .gate import (
    App,
    Gate,
    Receive,
    Scope,
    Send,
)

if TYPE_CHECKING:
    from minicpm_mlx.server.service import Service

PATH = "/chat"

HEAD = b"""<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' \
viewBox='0 0 32 32'><rect width='32' height='32' rx='8' fill='%230f766e'/>\
<path d='M8 23V9l8 9 8-9v14' fill='none' stroke='white' stroke-width='3.5'/></svg>">
<script src="page.js" defer></script>
"""


def available() -> bool:
    """Whether Gradio is installed; it is not imported to find out."""
    return importlib.util.find_spec("gradio") is not None


def check_gradio() -> None:
    """Raise MissingPackageError where Gradio is not installed."""
    if not available():
        raise MissingPackageError(
            'the web page needs gradio; install it with: pip install "minicpm-mlx[web]"'
        )


def mount(app: Any, service: Service) -> None:
    """Put the page at /chat of a FastAPI application.

    Gradio is imported when the page is first asked for: that takes it seconds. Raises
    MissingPackageError where it is not installed.
    """
    check_gradio()
    app.mount(PATH, ChatPage(service))


class ChatPage:
    """An ASGI application which makes the page with its first request."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._app: App | None = None
        self._making = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is None:
            async with self._making:
                self._app = self._app or await self._make()
        await self._app(scope, receive, send)

    async def _make(self) -> App:
        # The import alone is on another thread, so that replies under way go on meanwhile: what
        # Gradio makes belongs to the event loop it is made on.
        page = await asyncio.to_thread(importlib.import_module, "minicpm_mlx.server.web.page")
        script = resources.files(__package__).joinpath("page.js").read_bytes()
        files = {"/page.js": ("text/javascript; charset=utf-8", script)}
        made = page.application(self._service, PATH)
        return Gate(made, files, HEAD, page.events(made))
