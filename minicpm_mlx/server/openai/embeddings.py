"""OpenAI's /v1/embeddings."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from ..http.api_error import unsupported
from ..http.schema import Body, Ignored, refused
from ..http.streaming import run_until_disconnect
from ..service import Service
from .prompts import Prompts, read_prompts


class EmbeddingBody(Body):
    """Texts to turn into vectors."""

    input: Prompts
    """Text, or a list of texts; token ids where the server allows them."""
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    """Numbers, or little-endian float32 in base64."""
    dimensions: Annotated[int | None, refused("an embedding has the model's own width")] = None
    user: Ignored[str] = None


def normalize(vector: list[float]) -> list[float]:
    """`vector` scaled to length 1."""
    length = math.sqrt(sum(value * value for value in vector))
    return [value / length for value in vector] if length else vector


def _encode(vector: Sequence[float], encoding: str | None) -> list[float] | str:
    if encoding != "base64":
        return list(vector)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _refuse_ids(prompts: Any) -> None:
    """Some clients tokenize texts themselves, with OpenAI's tokenizer: vectors of these ids would
    be wrong, and nothing would tell."""
    if prompts and not isinstance(prompts, str) and not isinstance(prompts[0], str):
        raise unsupported(
            "input",
            "token ids may be those of another tokenizer; send text (LangChain's OpenAIEmbeddings: "
            "check_embedding_ctx_length=False), or start the server with --allow-embedding-ids",
        )


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/embeddings", response_model=None)
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        """Embed texts: the mean of the last hidden states over each text's tokens, with length 1.

        A language model is not trained to compare texts; an embedding model does better.
        """
        served = service.find_model(body.model)
        if not service.embedding_ids:
            _refuse_ids(body.input)
        ids = [list(prompt.ids) for prompt in await read_prompts(service, body.input, "input")]
        vectors = await run_until_disconnect(request, service.embed(served, ids))
        count = sum(map(len, ids))
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": _encode(normalize(vector), body.encoding_format),
            }
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return JSONResponse({"object": "list", "model": served.name, "data": data, "usage": usage})

    return routes
