"""Ollama's API: models, version and embeddings; replies.py has /generate and /chat."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ..http.api_error import ApiError
from ..http.schema import Body, Ignored, refused
from ..http.streaming import run_until_disconnect
from ..openai.embeddings import normalize
from ..service import Service
from . import replies
from .models import OllamaModels
from .schema import OllamaOptions

VERSION = "0.12.11"
"""The version of Ollama's API that is implemented; clients check it before they use features."""

_READ_ONLY = (
    ("POST", "/pull"),
    ("POST", "/push"),
    ("POST", "/create"),
    ("POST", "/copy"),
    ("DELETE", "/delete"),
    ("POST", "/blobs/{digest}"),
)


class ShowBody(Body):
    model: str | None = None
    name: str | None = None
    """The older name of `model`."""
    verbose: Ignored[bool] = None


class EmbedBody(Body):
    model: str
    input: str | list[str]
    truncate: bool | None = None
    """False refuses a text longer than the context; otherwise its end is cut off."""
    dimensions: Annotated[int | None, refused("an embedding has the model's own width", ())] = None
    options: OllamaOptions | None = None
    keep_alive: float | str | None = None
    """Accepted without effect: the model stays in memory."""


class EmbeddingsBody(Body):
    """The body of the older route."""

    model: str
    prompt: str | None = None
    options: OllamaOptions | None = None
    keep_alive: Ignored[float | str] = None


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/api")
    models = OllamaModels(service)

    @routes.get("/version")
    async def version() -> dict[str, str]:
        """Show the version of Ollama's API."""
        return {"version": VERSION}

    @routes.get("/tags")
    def tags() -> dict[str, Any]:
        """List the models."""
        return {"models": models.tags()}

    @routes.get("/ps")
    def ps() -> dict[str, Any]:
        """List the models in memory: all of them."""
        return {"models": models.ps()}

    @routes.post("/show")
    def show(body: ShowBody) -> dict[str, Any]:
        """Describe a model."""
        if not (name := body.model or body.name):
            raise ApiError("model is missing; name the one to show", field="model")
        return models.show(service.find_model(name))

    @routes.post("/embed")
    async def embed(body: EmbedBody, request: Request) -> Response:
        """Embed texts, with length 1."""
        start = time.perf_counter()
        texts = body.input
        if isinstance(texts, str):
            texts = [texts] if texts else []
        truncate = body.truncate is not False
        vectors, count = await _embed(service, request, body, texts, truncate)
        return JSONResponse(
            {
                "model": body.model,
                "embeddings": [normalize(vector) for vector in vectors],
                "total_duration": replies.nanoseconds(time.perf_counter() - start),
                "load_duration": 0,
                "prompt_eval_count": count,
            }
        )

    @routes.post("/embeddings")
    async def embeddings(body: EmbeddingsBody, request: Request) -> Response:
        """Embed a text: the mean of the last hidden states."""
        texts = [body.prompt] if body.prompt else []
        vectors, _ = await _embed(service, request, body, texts)
        return JSONResponse({"embedding": vectors[0] if vectors else []})

    for method, path in _READ_ONLY:
        routes.add_api_route(path, refuse_change, methods=[method])
    replies.add_routes(routes, service)
    return routes


async def refuse_change() -> None:
    """Refused: this server changes no models."""
    raise ApiError(
        "this server changes no models and serves those it was started with; "
        "use `minicpm-mlx pull` and `minicpm-mlx convert` for others",
        status=403,
        code="read_only",
    )


async def _embed(
    service: Service,
    request: Request,
    body: EmbedBody | EmbeddingsBody,
    texts: list[str],
    truncate: bool = True,
) -> tuple[list[list[float]], int]:
    """The embeddings of texts, and their number of tokens."""
    served, limit = service.find_model(body.model), service.context_length
    if body.options and body.options.num_ctx:
        limit = min(limit, body.options.num_ctx)
    prompts = [service.encode(text) for text in texts]
    for index, prompt in enumerate(prompts):
        if len(prompt) > limit and not truncate:
            raise ApiError(
                f"input {index} has {len(prompt)} tokens and the context is {limit}; "
                "shorten it, or leave truncate out",
                field="input",
                code="context_length_exceeded",
            )
    if not prompts:
        return [], 0
    prompts = [prompt[:limit] for prompt in prompts]
    vectors = await run_until_disconnect(request, service.embed(served, prompts))
    return vectors, sum(map(len, prompts))
