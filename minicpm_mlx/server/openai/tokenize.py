"""The tokenizer over HTTP, as in vLLM's server; lm-eval uses it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from ..http.api_error import ApiError
from ..http.schema import Body
from ..service import Service
from ..tool_calling import RequestTools, Tool
from .messages import Message, template_messages


class TokenizeBody(Body):
    """A text, or a conversation, to encode."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    """Whether a text begins with the model's bos, as by default."""
    return_token_strs: bool | None = None

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError("give one of prompt and messages", field="prompt")

    def ids(self, service: Service) -> list[int]:
        if self.messages is not None:
            tools = RequestTools(service, [tool.function for tool in self.tools or ()])
            messages = template_messages(self.messages)
            return service.chat_prompt(messages, tools=tools.for_template).ids
        text = self.prompt or ""
        return service.lm.tokenizer.encode(text, add_bos=self.add_special_tokens is not False)


class DetokenizeBody(Body):
    """Token ids to decode."""

    model: str | None = None
    tokens: list[int]


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    tokenizer = service.lm.tokenizer

    @routes.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """Show the tokenizer's special tokens and chat template."""
        template = tokenizer.template
        bos, eos = tokenizer.bos_id, tokenizer.eos_ids
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "bos_token": None if bos is None else service.token_text(bos),
            "eos_token": service.token_text(eos[0]) if eos else None,
            "add_bos_token": tokenizer.adds_bos,
            "chat_template": None if template is None else template.source,
            "model_max_length": service.context_length,
            "vocab_size": tokenizer.vocab_size,
        }

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """Convert text or messages to token ids."""
        service.find_model(body.model)
        ids = body.ids(service)
        texts = [service.token_text(token) for token in ids] if body.return_token_strs else None
        return {
            "count": len(ids),
            "max_model_len": service.context_length,
            "tokens": ids,
            "token_strs": texts,
        }

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        """Convert token ids to text, special tokens by name."""
        service.find_model(body.model)
        ids = service.check_ids(body.tokens, "tokens")
        return {"prompt": tokenizer.decode(ids, skip_special=False)}

    return routes
