"""/v1/models, in the form of OpenAI's API or of Anthropic's."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from ..anthropic.models import describe_model, is_anthropic, model_page
from ..reply_stream import ServedModel
from ..service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/models")
    async def list_models(
        request: Request,
        limit: int = 20,
        after_id: str | None = None,
        before_id: str | None = None,
    ) -> dict[str, Any]:
        """List the models: all, or with an anthropic-version header a page in Anthropic's form."""
        if is_anthropic(request.headers):
            return model_page(service, limit, after_id, before_id)
        return {"object": "list", "data": [_describe(service, model) for model in service.models]}

    @routes.get("/v1/models/{name:path}")
    async def show_model(name: str, request: Request) -> dict[str, Any]:
        """Show one model."""
        served = service.find_model(name)
        describe = describe_model if is_anthropic(request.headers) else _describe
        return describe(service, served)

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
