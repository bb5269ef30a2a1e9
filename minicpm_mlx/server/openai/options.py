"""Request fields of OpenAI's chat and completions API, with those that vLLM adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from ...engine import Grammar
from ..http.api_error import ApiError
from ..http.schema import Body, Ignored, OneOf
from ..parameters import CompletionFields, SignedSeed, StopString, lark_choice, repeat
from ..reply_stream import GenerationRequest
from ..service import Service


class StreamOptions(Body):
    include_obfuscation: bool | None = None
    """Accepted without effect: padding against eavesdroppers, which a local server has none of."""


class UsageStreamOptions(StreamOptions):
    include_usage: bool | None = None


class OpenAIFields(CompletionFields):
    """Sampling, stops and streaming; None is the model's default."""

    model: str | None = None
    """A name that /v1/models lists; None is the first of them."""
    seed: SignedSeed | None = None
    stream: bool | None = None
    stream_options: UsageStreamOptions | None = None
    user: Ignored[str] = None
    metadata: Ignored[dict[str, str]] = None

    # Fields of vLLM.
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    guided_json: dict[str, Any] | None = None
    """A JSON schema that the reply follows."""
    guided_regex: str | None = None
    guided_choice: Annotated[list[StopString], Field(min_length=1)] | None = None
    """The reply is one of these."""
    guided_grammar: str | None = None
    """A grammar that the reply follows, in Lark's form or as GBNF."""

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                "stream_options goes with stream: true; set that, or leave stream_options out",
                field="stream_options",
            )

    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def guides(self) -> dict[str, dict[str, Any]]:
        """vLLM's guided decoding: arguments of `compile_grammar` by field."""
        choice = self.guided_choice
        guides = {
            "guided_json": ("json_schema", self.guided_json),
            "guided_regex": ("regex", self.guided_regex),
            "guided_choice": ("ebnf", choice and f"start: {lark_choice(choice)}"),
            "guided_grammar": ("ebnf", self.guided_grammar),
        }
        given = {field: guide for field, guide in guides.items() if guide[1] is not None}
        return {field: {name: value} for field, (name, value) in given.items()}

    def generations(
        self,
        service: Service,
        prompts: Sequence[Sequence[int]],
        grammar: Grammar | None,
        **fields: Any,
    ) -> list[GenerationRequest]:
        """`n` requests for each prompt, in order; `fields` are those of GenerationRequest."""
        request = self.generation(
            service,
            seed=None if self.seed is None else self.seed % 2**64,
            prompt=[],
            served=service.find_model(self.model),
            min_tokens=self.min_tokens or 0,
            **fields,
        )
        return [
            copy
            for prompt in prompts
            for copy in repeat(replace(request, prompt=prompt), self.n or 1, grammar)
        ]


class TextFormat(Body):
    type: Literal["text"]

    def guide(self) -> dict[str, Any]:
        """Arguments of `compile_grammar`."""
        return {}


class JsonObject(Body):
    """Any JSON object."""

    type: Literal["json_object"]

    def guide(self) -> dict[str, Any]:
        return {"json_object": True}


class JsonSchema(Body):
    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None
    """Accepted: the reply always follows the schema."""

    def guide(self) -> dict[str, Any]:
        return {"json_schema": self.schema_}


class NestedSchema(Body):
    """A schema in the chat API."""

    type: Literal["json_schema"]
    json_schema: JsonSchema

    def guide(self) -> dict[str, Any]:
        return self.json_schema.guide()


class FlatSchema(JsonSchema):
    """A schema in the responses API."""

    type: Literal["json_schema"]


ResponseFormat = Annotated[TextFormat | JsonObject | NestedSchema, OneOf("type")]
TextOptionsFormat = Annotated[TextFormat | JsonObject | FlatSchema, OneOf("type")]
