"""Mounts the page in the server; it is built at its first request."""

from __future__ import annotations

import asyncio
import importlib
from importlib import resources
from typing import TYPE_CHECKING, Any

from ..requirements import check_packages
from .gate import Gate

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from ..service import Service

PATH = "/chat"

HEAD = b"""<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' \
viewBox='0 0 32 32'><rect width='32' height='32' rx='8' fill='%230f766e'/>\
<path d='M8 23V9l8 9 8-9v14' fill='none' stroke='white' stroke-width='3.5'/></svg>">
<script src="page.js" defer></script>
"""


def mount(app: Any, service: Service) -> None:
    """Adds the page at /chat to a FastAPI application; MissingPackageError without its packages.

    Gradio is imported at the first request of the page, because that takes seconds.
    """
    check_packages(page=True)
    app.mount(PATH, ChatPage(service))


class ChatPage:
    """An ASGI application that builds the page at its first request."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._app: ASGIApp | None = None
        self._building = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._app is None:
            async with self._building:
                self._app = self._app or await self._build()
        await self._app(scope, receive, send)

    async def _build(self) -> ASGIApp:
        # Only the import is on another thread, so that running replies continue: the objects of
        # Gradio belong to the event loop that creates them.
        page = await asyncio.to_thread(importlib.import_module, "minicpm_mlx.server.web.page")
        script = resources.files(__package__).joinpath("page.js").read_bytes()
        files = {"/page.js": ("text/javascript; charset=utf-8", script)}
        application = page.application(self._service, PATH)
        return Gate(application, files, HEAD, page.events(application))
