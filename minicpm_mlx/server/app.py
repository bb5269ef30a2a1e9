"""The application: routes of all APIs, the pages, and errors in each API's own form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Scope

from .. import __version__
from ..errors import TokenizerError
from . import pages
from .anthropic import routes as anthropic
from .anthropic.models import is_anthropic
from .http.api_error import ApiError, unsupported
from .http.guard import Guard
from .http.settings import Settings
from .http.streaming import ClientDisconnected
from .metrics import CONTENT_TYPE, Metrics
from .ollama import replies as ollama_replies
from .ollama import routes as ollama
from .openai import chat_completions, completions, embeddings, models, responses, tokenize
from .openai.common import error_body
from .service import Service
from .sglang import routes as sglang

APIS = {
    "OpenAI": (chat_completions, completions, tokenize, models, responses, embeddings),
    "Anthropic": (anthropic,),
    "Ollama": (ollama,),
    "SGLang": (sglang,),
}


def create_app(service: Service, settings: Settings) -> FastAPI:
    """The ASGI application that serves `service` to the clients that `settings` allow."""
    app = FastAPI(title="minicpm-mlx", version=__version__, docs_url=None, redoc_url=None)
    metrics = Metrics(service)
    for name, modules in APIS.items():
        for module in modules:
            app.include_router(module.router(service), tags=[name])
    _add_own_routes(app, service, metrics)
    for kind, handler in (
        (ApiError, _on_api_error),
        (TokenizerError, _on_tokenizer_error),
        (RequestValidationError, _on_validation_error),
        (HTTPException, _on_http_error),
        (ClientDisconnected, _on_disconnect),
        (Exception, _on_exception),
    ):
        app.add_exception_handler(kind, handler)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    # Not by add_middleware, which would leave some of FastAPI's own middleware outside.
    app.middleware_stack = Guard(
        app.build_middleware_stack(), settings, error_response, metrics.on_response
    )
    return app


def _add_own_routes(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.get("/health", tags=["server"])
    async def health() -> dict[str, str]:
        """Whether the server runs."""
        return {"status": "ok"}

    @app.get("/metrics", tags=["server"], response_class=Response)
    async def read_metrics() -> Response:
        """Measurements in the format of Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return pages.index(request, service)

    # A path below that of the chat page, which would answer it with a page of its own.
    @app.post("/chat/completions", include_in_schema=False)
    async def completions() -> None:
        raise HTTPException(404)

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        return pages.docs(request, app.openapi())


async def _on_api_error(request: Request, error: Any) -> JSONResponse:
    return error_response(request.scope, error)


async def _on_tokenizer_error(request: Request, error: Exception) -> Response:
    """A text that the model cannot read."""
    return error_response(request.scope, ApiError(str(error), code="invalid_value"))


async def _on_validation_error(request: Request, error: Any) -> JSONResponse:
    return error_response(request.scope, validation_error(error.errors(), error.body))


async def _on_http_error(request: Request, error: Any) -> JSONResponse:
    path, headers = request.url.path, dict(error.headers or {})
    api_error = ApiError(str(error.detail), status=error.status_code)
    if error.status_code == 405:
        allowed = headers.get("Allow", "")
        api_error = ApiError(f"{path} takes {allowed}, not {request.method}", status=405)
    elif error.status_code == 404:
        message = f"there is no {request.method} {path[:80]}; {_suggestion(request.app, path)}"
        api_error = ApiError(message, status=404, code="not_found")
    return error_response(request.scope, api_error, headers)


def _suggestion(app: FastAPI, path: str) -> str:
    """Helps with an unknown path; most often the client's base URL is too short."""
    paths = app.openapi()["paths"]
    for similar in (f"/v1{path}", path.removeprefix("/v1")):
        if similar in paths:
            return (
                f"did you mean {similar}? The base URL of OpenAI's clients ends in /v1, that of "
                "others does not"
            )
    return "/docs lists all routes"


async def _on_disconnect(request: Request, error: Any) -> Response:
    return Response(status_code=499)  # nobody reads it; it is for the log


async def _on_exception(request: Request, error: Any) -> JSONResponse:
    return error_response(request.scope, ApiError("the server failed; see its log", status=500))


def validation_error(errors: list[dict[str, Any]], body: object) -> ApiError:
    """ApiError 400 for the most specific of pydantic's errors in `body`.

    Undeclared fields come first, then the deepest error: those above it may be of other branches of
    a union.
    """
    worst = max(
        errors,
        key=lambda error: (
            error["type"] == "extra_forbidden",
            len(error["loc"]),
            error["type"] != "unsupported",
        ),
    )
    kind, loc = worst["type"], worst["loc"]
    field = _field_path(loc, body, missing=kind == "missing")
    if kind == "unsupported":
        return unsupported(field, worst["msg"])
    if kind == "extra_forbidden":
        return ApiError(f"{field} is not known here; leave it out", field=field, code="unknown")
    if kind == "missing":
        return ApiError(f"{field} is missing", field=field, code="missing")
    messages = [
        error["msg"]
        for error in errors
        if len(error["loc"]) == len(loc) and error["type"] != "unsupported"
    ]
    expected = "; or: ".join(dict.fromkeys(messages))[:300]
    return ApiError(f"{field}: {expected}", field=field, code="invalid_value")


def _field_path(loc: Sequence[str | int], body: object, *, missing: bool) -> str:
    """The path of a field in the body, such as messages[0].content.

    Between the names of fields pydantic puts tags of union branches. A name that is not in the body
    is such a tag, except for the last one if that is the field that is missing.
    """
    path, value = "", body
    for number, step in enumerate(loc[1:], 2):
        if isinstance(value, list) and isinstance(step, int) and step < len(value):
            path, value = f"{path}[{step}]", value[step]
        elif isinstance(value, dict) and step in value:
            path, value = f"{path}.{str(step)[:80]}", value[step]
        elif missing and number == len(loc):
            path = f"{path}.{step}"
    return path.removeprefix(".") or str(loc[-1])


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document. Invalid requests are 400 here, not FastAPI's 422."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        error = {
            "description": "An error in the API's own form",
            "content": {"application/json": {"schema": {"type": "object"}}},
        }
        for path, methods in document.get("paths", {}).items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                operation["responses"] |= {"4XX": error, "5XX": error}
                if _can_stream(operation, document):
                    media = "application/x-ndjson" if "/api/" in path else "text/event-stream"
                    operation["responses"]["200"]["content"][media] = {"schema": {}}
        for name in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema


def _can_stream(operation: dict[str, Any], document: dict[str, Any]) -> bool:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
    schema = document.get("components", {}).get("schemas", {}).get(name, {})
    return "stream" in schema.get("properties", {})


_SGLANG_PATHS = (
    "/generate",
    "/get_model_info",
    "/server_info",
    "/get_server_info",
    "/flush_cache",
    "/health_generate",
)


def _error_body(scope: Scope, error: ApiError) -> dict[str, Any]:
    """The body of an error in the form of the API that was asked."""
    path = scope["path"]
    shared = path == "/v1/models" or path.startswith("/v1/models/")
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return anthropic.error_body(error)
    if shared and is_anthropic(Headers(scope=scope)):
        return anthropic.error_body(error)
    if path.startswith("/api/"):
        return ollama_replies.error_body(error)
    if path in _SGLANG_PATHS:
        return sglang.error_body(error)
    return error_body(error)


def error_response(
    scope: Scope, error: ApiError, headers: dict[str, str] | None = None
) -> JSONResponse:
    body, headers = _error_body(scope, error), dict(headers or {})
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if "request_id" in body:  # where Anthropic's clients look for it
        headers["request-id"] = body["request_id"]
    return JSONResponse(body, error.status, headers)
