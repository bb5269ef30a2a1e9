"""Which API a path belongs to, and so the form in which its refusals are written."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from .anthropic import routes
from .http.api_error import Refusal
from .ollama import routes as ollama
from .openai import routes as openai
from .sglang import routes as sglang

_SGLANG = (
    "/generate",
    "/get_model_info",
    "/server_info",
    "/get_server_info",
    "/flush_cache",
    "/health_generate",
)


def refused(path: str, refusal: Refusal) -> dict[str, Any]:
    """The body that says `refusal` to a client which asked for `path`."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return routes.refused(refusal)
    if path.startswith("/api/"):
        return ollama.refused(refusal)
    if path in _SGLANG:
        return sglang.refused(refusal)
    return openai.refused(refusal)


def answer(path: str, refusal: Refusal, headers: dict[str, str] | None = None) -> JSONResponse:
    """The response that says it."""
    sent = dict(headers or {})
    if refusal.retry_after is not None:
        sent["Retry-After"] = str(refusal.retry_after)
    body = refused(path, refusal)
    if "request_id" in body:  # where Anthropic's clients look for it
        sent["request-id"] = body["request_id"]
    return JSONResponse(body, refusal.status, sent)
