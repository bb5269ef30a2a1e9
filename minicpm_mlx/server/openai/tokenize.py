"""The tokenizer over HTTP, as vLLM serves it and lm-eval asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from ..http.api_error import ApiError
from ..http.streaming import Body
from ..tool_calling import Tool, Toolbox
from .messages import Message, templated

if TYPE_CHECKING:
    from ..service import Service


class Tokenize(Body):
    """A text, or a conversation, to encode."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    """Whether a text begins with the model's bos."""
    return_token_strs: bool | None = None

    def ids(self, service: Service) -> list[int]:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "give one of prompt and messages", field="prompt")
        if self.messages is not None:
            toolbox = Toolbox(service, [tool.function for tool in self.tools or ()])
            return service.conversation(templated(self.messages), tools=toolbox.for_template)[0]
        text = self.prompt or ""
        if self.add_special_tokens:
            return service.encode(text)
        return service.lm.tokenizer.encode(text, add_bos=False)


class Detokenize(Body):
    """Token ids to decode."""

    model: str | None = None
    tokens: list[int]


def router(service: Service) -> APIRouter:
    """The routes of the tokenizer."""
    routes = APIRouter()
    tokenizer = service.lm.tokenizer

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """The tokenizer's special tokens and chat template."""
        template = tokenizer.template
        bos, ends = tokenizer.bos_id, tokenizer.eos_ids
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "bos_token": None if bos is None else service.text_of(bos),
            "eos_token": service.text_of(ends[0]) if ends else None,
            "add_bos_token": tokenizer.adds_bos,
            "chat_template": None if template is None else template.source,
            "model_max_length": service.context_length,
            "vocab_size": tokenizer.vocab_size,
        }

    @routes.post("/tokenize")
    async def tokenize(body: Tokenize) -> dict[str, Any]:
        """Text or messages to token ids."""
        service.served(body.model)
        ids = body.ids(service)
        named = [service.text_of(token) for token in ids] if body.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": service.context_length,
            "tokens": ids,
            "token_strs": named,
        }

    @routes.post("/detokenize")
    async def detokenize(body: Detokenize) -> dict[str, Any]:
        """Token ids to text, special tokens by name."""
        service.served(body.model)
        ids = service.check_ids(body.tokens, "tokens")
        return {"prompt": tokenizer.decode(ids, skip_special=False)}

    return routes
