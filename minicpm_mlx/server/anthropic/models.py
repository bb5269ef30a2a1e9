"""Anthropic's form of /v1/models, a path that it shares with OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from ..http.api_error import ApiError
from ..reply_stream import ServedModel
from ..service import Service


def is_anthropic(headers: Mapping[str, str]) -> bool:
    """Whether the client speaks Anthropic's API: it always says which version."""
    return "anthropic-version" in headers


def model_page(
    service: Service, limit: int, after_id: str | None, before_id: str | None
) -> dict[str, Any]:
    """Up to `limit` models: the first ones, those after a model, or those just before one."""
    if not 1 <= limit <= 1000:
        raise ApiError(f"limit must be 1 to 1000, got {limit}", field="limit")
    models = [describe_model(service, served) for served in service.models]
    names = [model["id"] for model in models]
    for field, name in (("after_id", after_id), ("before_id", before_id)):
        if name is not None and name not in names:
            raise ApiError(f"{field}: expected one of {', '.join(names)}", field=field)
    start = 0 if after_id is None else names.index(after_id) + 1
    end = len(models) if before_id is None else names.index(before_id)
    rest = models[start:end]
    backwards = before_id is not None and after_id is None
    page = rest[-limit:] if backwards else rest[:limit]
    return {
        "data": page,
        "has_more": len(page) < len(rest),
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
    }


def describe_model(service: Service, served: ServedModel) -> dict[str, Any]:
    created = datetime.fromtimestamp(service.created, timezone.utc)
    return {
        "type": "model",
        "id": served.name,
        "display_name": served.name,
        "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
        "max_input_tokens": service.context_length,
        "max_tokens": service.context_length,
    }
