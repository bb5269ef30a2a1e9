"""OpenAI's /v1/embeddings."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ..http.streaming import Body, answered
from ..parameters import refuse_all
from .prompts import Prompts, read_prompts

if TYPE_CHECKING:
    from ..service import Service


class Embedding(Body):
    """Texts to turn into vectors."""

    input: Prompts
    """Text, token ids, or a list of either."""
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    """Numbers, or little-endian float32 in base64."""
    dimensions: int | None = None
    user: str | None = None
    """Accepted without effect."""


def unit(vector: list[float]) -> list[float]:
    """`vector` with length 1."""
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length for value in vector] if length else vector


def encoded(vector: Sequence[float], encoding: str | None) -> list[float] | str:
    """A vector as the client wants it."""
    if encoding != "base64":
        return list(vector)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def router(service: Service) -> APIRouter:
    """The route of the embeddings API."""
    routes = APIRouter()

    @routes.post("/v1/embeddings", response_model=None)
    async def embeddings(body: Embedding, request: Request) -> Response:
        """The mean of the model's last hidden states over each text's tokens, scaled to length 1.

        A language model's, never trained to be compared: a model made for it does better.
        """
        refuse_all(
            {"dimensions": (body.dimensions, f"vectors have {service.lm.config.hidden_size}")}
        )
        served = service.served(body.model)
        prompts = await read_prompts(service, body.input, "input")
        ids = [list(prompt.ids) for prompt in prompts]
        vectors = await answered(request, service.embed(served, ids))
        count = sum(map(len, ids))
        found: dict[str, Any] = {
            "object": "list",
            "model": served.name,
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": encoded(unit(vector), body.encoding_format),
                }
                for index, vector in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }
        return JSONResponse(found)

    return routes
