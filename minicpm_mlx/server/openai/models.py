"""OpenAI's /v1/models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ..reply_stream import ServedModel
from ..service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the models."""
        return {"object": "list", "data": [_describe(service, model) for model in service.models]}

    @routes.get("/v1/models/{name:path}")
    async def show_model(name: str) -> dict[str, Any]:
        """Show one model."""
        return _describe(service, service.find_model(name))

    return routes


def _describe(service: Service, served: ServedModel) -> dict[str, Any]:
    """A model in OpenAI's form, with vLLM's context length."""
    return {
        "id": served.name,
        "object": "model",
        "created": service.created,
        "owned_by": "minicpm-mlx",
        "max_model_len": service.context_length,
    }
