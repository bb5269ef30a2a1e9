"""The application: every API's routes, the pages, and errors in each API's own form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from .. import __version__
from . import pages
from .anthropic import routes as anthropic
from .http.api_error import ApiError
from .http.guard import Guard
from .http.settings import Settings
from .http.streaming import Gone
from .metrics import CONTENT_TYPE, Metrics
from .ollama import routes as ollama
from .openai import embeddings, responses
from .openai import routes as openai
from .service import Service
from .sglang import routes as sglang

APIS = {
    "OpenAI": (openai, responses, embeddings),
    "Anthropic": (anthropic,),
    "Ollama": (ollama,),
    "SGLang": (sglang,),
}


def create_app(service: Service, settings: Settings) -> FastAPI:
    """An application that answers for `service`, and lets in whom `settings` allow."""
    app = FastAPI(
        title="minicpm-mlx", version=__version__, docs_url=None, redoc_url=None, debug=False
    )
    metrics = Metrics(service)
    for name, modules in APIS.items():
        for module in modules:
            app.include_router(module.router(service), tags=[name])
    _add_own_routes(app, service, metrics)
    for kind, handler in (
        (ApiError, _refusal),
        (RequestValidationError, _invalid),
        (HTTPException, _http),
        (Gone, _gone),
        (Exception, _failed),
    ):
        app.add_exception_handler(kind, handler)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    # Not by add_middleware, which would leave some of FastAPI's own outside.
    app.middleware_stack = Guard(app.build_middleware_stack(), settings, answer, metrics.request)
    return app


def _add_own_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.head("/health", include_in_schema=False)
    @app.get("/health", tags=["server"])
    async def health() -> dict[str, str]:
        """Whether the server runs."""
        return {"status": "ok"}

    @app.get("/metrics", tags=["server"], response_class=Response)
    async def measured() -> Response:
        """Measurements in the form of Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return pages.index(request, service)

    # Below the chat page's address, which would answer otherwise.
    @app.post("/chat/completions", include_in_schema=False)
    async def completions() -> None:
        raise HTTPException(404)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return pages.docs(request, app.openapi())


async def _refusal(request: Request, error: Any) -> JSONResponse:
    return answer(request.url.path, error)


async def _invalid(request: Request, error: Any) -> JSONResponse:
    return answer(request.url.path, invalid(error.errors(), error.body))


async def _http(request: Request, error: Any) -> JSONResponse:
    path, allowed = request.url.path, (error.headers or {}).get("Allow", "")
    if error.status_code == 405:
        refusal = ApiError(405, f"{request.method} is not for {path}; it takes {allowed}")
        return answer(path, refusal, {"Allow": allowed})
    if error.status_code == 404:
        what = f"there is no {request.method} {path[:80]}; {_instead(request.app, path)}"
        return answer(path, ApiError(404, what, code="not_found"))
    return answer(path, ApiError(error.status_code, str(error.detail)), dict(error.headers or {}))


def _instead(app: FastAPI, path: str) -> str:
    """What may have been meant by a path that is not there: most often a base URL is too short."""
    known = app.openapi()["paths"]
    meant = next((one for one in (f"/v1{path}", path.removeprefix("/v1")) if one in known), None)
    if meant is None:
        return "/docs lists what there is"
    return f"did you mean {meant}? The base URL for OpenAI's clients ends in /v1, others' do not"


async def _gone(request: Request, error: Any) -> Response:
    return Response(status_code=499)  # nobody reads it; it is for the log


async def _failed(request: Request, error: Any) -> JSONResponse:
    return answer(request.url.path, ApiError(500, "the server failed; see its log"))


def invalid(errors: list[dict[str, Any]], body: object) -> ApiError:
    """ApiError 400 for a `body` that is not as it was declared, by what is wrong deepest inside."""
    worst = max(errors, key=lambda error: (error["type"] == "extra_forbidden", len(error["loc"])))
    field = _field(worst["loc"], body, missing=worst["type"] == "missing")
    if worst["type"] == "extra_forbidden":
        return ApiError(
            400, f"{field} is not known here; leave it out", field=field, code="unknown"
        )
    if worst["type"] == "missing":
        return ApiError(400, f"{field} is missing", field=field, code="missing")
    same = [error["msg"] for error in errors if len(error["loc"]) == len(worst["loc"])]
    said = "; or: ".join(dict.fromkeys(same))[:300]
    return ApiError(400, f"{field}: {said}", field=field, code="invalid_value")


def _field(place: Sequence[str | int], body: object, *, missing: bool) -> str:
    """A place in the body, such as messages[0].content.

    Among the names of fields pydantic puts words that tell the branches of a union apart: what is
    not in the body is one of those, but for the last, where that is the field that is missing.
    """
    found, value = "", body
    for number, part in enumerate(place[1:], 2):
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            found, value = f"{found}[{part}]", value[part]
        elif isinstance(value, dict) and part in value:
            found, value = f"{found}.{str(part)[:80]}", value[part]
        elif missing and number == len(place):
            found = f"{found}.{part}"
    return found.removeprefix(".") or str(place[-1])


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document. Invalid requests are 400 here, not FastAPI's 422."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        refused = {
            "description": "Refused, in the API's own form of an error",
            "content": {"application/json": {"schema": {"type": "object"}}},
        }
        for path, methods in found.get("paths", {}).items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                operation["responses"] |= {"4XX": refused, "5XX": refused}
                if _streams(operation, found):
                    kind = "application/x-ndjson" if "/api/" in path else "text/event-stream"
                    operation["responses"]["200"]["content"][kind] = {"schema": {}}
        for name in ("HTTPValidationError", "ValidationError"):
            found.get("components", {}).get("schemas", {}).pop(name, None)
        app.openapi_schema = found
    return app.openapi_schema


def _streams(operation: dict[str, Any], document: dict[str, Any]) -> bool:
    """Whether the body has a field that asks for the answer in pieces."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
    shape = document.get("components", {}).get("schemas", {}).get(name, {})
    return "stream" in shape.get("properties", {})


_SGLANG = (
    "/generate",
    "/get_model_info",
    "/server_info",
    "/get_server_info",
    "/flush_cache",
    "/health_generate",
)


def refused(path: str, refusal: ApiError) -> dict[str, Any]:
    """The body that says `refusal` to a client which asked for `path`."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return anthropic.refused(refusal)
    if path.startswith("/api/"):
        return ollama.refused(refusal)
    if path in _SGLANG:
        return sglang.refused(refusal)
    return openai.refused(refusal)


def answer(path: str, refusal: ApiError, headers: dict[str, str] | None = None) -> JSONResponse:
    """The response that says it."""
    sent = dict(headers or {})
    if refusal.retry_after is not None:
        sent["Retry-After"] = str(refusal.retry_after)
    body = refused(path, refusal)
    if "request_id" in body:  # where Anthropic's clients look for it
        sent["request-id"] = body["request_id"]
    return JSONResponse(body, refusal.status, sent)
