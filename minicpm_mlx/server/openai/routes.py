"""OpenAI's API: its models, and the routes of its parts; and what vLLM's servers add to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter

from . import chat_completions, completions, tokenize
from .common import refused

if TYPE_CHECKING:
    from ..service import ServedModel, Service

__all__ = ["refused", "router"]


def router(service: Service) -> APIRouter:
    """The routes under /v1, but those of responses and embeddings, and the tokenizer's."""
    routes = APIRouter()
    for part in (chat_completions, completions, tokenize):
        routes.include_router(part.router(service))

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The models that are served."""
        return {"object": "list", "data": [described(service, one) for one in service.names]}

    @routes.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        """One of them."""
        return described(service, service.served(name))

    return routes


def described(service: Service, served: ServedModel) -> dict[str, Any]:
    """A model as OpenAI lists it, with its context length as vLLM does."""
    return {
        "id": served.name,
        "object": "model",
        "created": service.created,
        "owned_by": "minicpm-mlx",
        "max_model_len": service.context_length,
    }
