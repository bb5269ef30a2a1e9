"""Ollama's API: models, versions and embeddings; replies are in ollama_replies.py."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ..http.api_error import ApiError, unsupported
from ..http.streaming import Body, answered
from ..openai.embeddings import unit
from . import replies
from .models import Models
from .schema import OllamaOptions

if TYPE_CHECKING:
    from ..service import ServedModel, Service

VERSION = "0.12.11"
"""Of Ollama's API that is followed here; clients ask for a version before they use what it has."""

_CHANGES = (
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
    """What `model` was called once."""
    verbose: bool | None = None
    """Accepted without effect: there is no longer answer."""


class EmbedBody(Body):
    model: str
    input: str | list[str]
    truncate: bool | None = None
    """False refuses a text longer than the context; otherwise its end is cut off."""
    dimensions: int | None = None
    options: OllamaOptions | None = None
    keep_alive: float | str | None = None
    """Accepted without effect: the model stays."""


class EmbeddingsBody(Body):
    """The older form."""

    model: str
    prompt: str | None = None
    options: OllamaOptions | None = None
    keep_alive: float | str | None = None
    """Accepted without effect."""


def refused(refusal: ApiError) -> dict[str, Any]:
    """The body of an answer that is none."""
    return {"error": refusal.message}


def router(service: Service) -> APIRouter:
    """The routes under /api."""
    routes = APIRouter(prefix="/api")
    models = Models(service)

    @routes.get("/version")
    async def version() -> dict[str, str]:
        """The version of Ollama's API that is followed."""
        return {"version": VERSION}

    @routes.get("/tags")
    def tags() -> dict[str, Any]:
        """The models that are served."""
        return {"models": models.listed()}

    @routes.get("/ps")
    def ps() -> dict[str, Any]:
        """The models that are in memory: all of them."""
        return {"models": models.running()}

    @routes.post("/show")
    def show(body: ShowBody) -> dict[str, Any]:
        """What there is to know of a model."""
        return models.shown(service.served(_name(body)))

    @routes.post("/embed")
    async def embed(body: EmbedBody, request: Request) -> Response:
        """Embeddings of texts, of length 1."""
        begun = time.perf_counter()
        texts = (
            [text for text in [body.input] if text] if isinstance(body.input, str) else body.input
        )
        vectors, count = await _embedded(service, request, body, texts)
        return JSONResponse(
            {
                "model": body.model,
                "embeddings": [unit(vector) for vector in vectors],
                "total_duration": replies.nanoseconds(time.perf_counter() - begun),
                "load_duration": 0,
                "prompt_eval_count": count,
            }
        )

    @routes.post("/embeddings")
    async def embeddings(body: EmbeddingsBody, request: Request) -> Response:
        """The embedding of a text: the mean of the last hidden states."""
        texts = [body.prompt] if body.prompt else []
        vectors, _ = await _embedded(service, request, body, texts)
        return JSONResponse({"embedding": vectors[0] if vectors else []})

    for method, path in _CHANGES:
        routes.add_api_route(path, unchanging, methods=[method])
    replies.add(routes, service)
    return routes


async def unchanging() -> None:
    """Refused: this server changes no models."""
    raise ApiError(
        403,
        "this server changes no models: it serves those it was started with; "
        "`minicpm-mlx pull` and `minicpm-mlx convert` get and make others",
        code="read_only",
    )


def _name(body: ShowBody) -> str:
    name = body.model or body.name
    if not name:
        raise ApiError(400, "model is missing; name the one to show", field="model")
    return name


async def _embedded(
    service: Service, request: Request, body: EmbedBody | EmbeddingsBody, texts: list[str]
) -> tuple[list[list[float]], int]:
    """The embeddings of texts, and how many tokens were read."""
    served = service.served(body.model)
    truncate = True
    if isinstance(body, EmbedBody):
        truncate = body.truncate is not False
        if body.dimensions is not None:
            raise unsupported("dimensions", "an embedding has the model's own width")
    limit = service.context_length
    prompts = [service.encode(text) for text in texts]
    for index, prompt in enumerate(prompts):
        if len(prompt) > limit and not truncate:
            raise ApiError(
                400,
                f"input {index} has {len(prompt)} tokens and the context is {limit}; "
                "shorten it, or leave truncate out",
                field="input",
                code="context_length_exceeded",
            )
    return await _read(service, request, served, [prompt[:limit] for prompt in prompts])


async def _read(
    service: Service, request: Request, served: ServedModel, prompts: list[list[int]]
) -> tuple[list[list[float]], int]:
    if not prompts:
        return [], 0
    vectors = await answered(request, service.embed(served, prompts))
    return vectors, sum(map(len, prompts))
