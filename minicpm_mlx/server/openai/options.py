"""The options that OpenAI's chat and completions API share, and those that vLLM adds to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from ...engine import Sampling
from ...engine.grammar import Grammar
from ..http.api_error import ApiError
from ..http.streaming import Body
from ..parameters import Stop, StopString, alternatives, bias_of
from ..reply_stream import GenerationRequest

if TYPE_CHECKING:
    from ..service import Service


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted: padding against listeners on the way, of which a local server has none."""


class OpenAIOptions(Body):
    """How a reply is drawn and where it ends; None is the model's default."""

    model: str | None = None
    """A name that /v1/models lists; None is the first of them."""
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    """Token ids, as text, and what is added to their logits: -100 to 100."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """Replies to each prompt; number i of a request with a seed is drawn with seed + i."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None

    user: str | None = None
    """Accepted without effect."""
    metadata: dict[str, str] | None = None
    """Accepted without effect."""

    # What vLLM adds.
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """-1 and 0 keep all tokens."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=128)] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    """Accepted without effect: no spaces are put in."""
    guided_json: dict[str, Any] | None = None
    """A JSON schema that the reply follows."""
    guided_regex: str | None = None
    guided_choice: Annotated[list[StopString], Field(min_length=1)] | None = None
    """The reply is one of these."""
    guided_grammar: str | None = None
    """A grammar that the reply follows, in Lark's form or as GBNF."""

    def sampling(self, service: Service) -> Sampling:
        """How tokens are drawn, the model's defaults where nothing is given."""
        return service.sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=None
            if self.logit_bias is None
            else bias_of(service, self.logit_bias, "logit_bias"),
            seed=None if self.seed is None else self.seed % 2**64,
        )

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_stream(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise ApiError(
                400,
                "stream_options goes with stream: true; set that, or leave stream_options out",
                field="stream_options",
            )

    def guides(self) -> dict[str, dict[str, Any]]:
        """vLLM's guided decoding, by field, as arguments of `grammar_of`; usually there is none."""
        choice = self.guided_choice
        wanted = {
            "guided_json": ("json_schema", self.guided_json),
            "guided_regex": ("regex", self.guided_regex),
            "guided_choice": ("ebnf", choice and f"start: {alternatives(choice)}"),
            "guided_grammar": ("ebnf", self.guided_grammar),
        }
        return {
            field: {name: value} for field, (name, value) in wanted.items() if value is not None
        }

    def asks(
        self, service: Service, prompts: Sequence[Sequence[int]], **given: Any
    ) -> list[GenerationRequest]:
        """`n` replies to each prompt, in order; `given` goes into each Ask."""
        sampling, count = self.sampling(service), self.n or 1
        seeds = [
            None if sampling.seed is None else (sampling.seed + i) % 2**64 for i in range(count)
        ]
        grammar: Grammar | None = given.pop("grammar", None)
        return [
            GenerationRequest(
                prompt=prompt,
                sampling=replace(sampling, seed=seed),
                served=service.served(self.model),
                min_tokens=self.min_tokens or 0,
                stop_tokens=service.check_ids(self.stop_token_ids or [], "stop_token_ids"),
                grammar=None if grammar is None else grammar.copy(),
                **{"ignore_eos": bool(self.ignore_eos)} | given,
            )
            for prompt in prompts
            for seed in seeds
        ]


class TextFormat(Body):
    type: Literal["text"]


class JsonObject(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Body):
    """A schema with its name, as the chat API has it."""

    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema", default_factory=dict)]
    description: str | None = None
    strict: bool | None = None
    """Accepted: the schema is always followed."""


class NestedSchema(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class FlatSchema(JsonSchema):
    """The same as the responses API has it."""

    type: Literal["json_schema"]


ResponseFormat = Annotated[TextFormat | JsonObject | NestedSchema, Field(discriminator="type")]


TextOptionsFormat = Annotated[TextFormat | JsonObject | FlatSchema, Field(discriminator="type")]


def guide_of(wanted: TextFormat | JsonObject | NestedSchema | FlatSchema | None) -> dict[str, Any]:
    """A format as an argument of `grammar_of`; empty for text."""
    if isinstance(wanted, JsonObject):
        return {"json_object": True}
    if isinstance(wanted, NestedSchema):
        return {"json_schema": wanted.json_schema.schema_}
    if isinstance(wanted, FlatSchema):
        return {"json_schema": wanted.schema_}
    return {}
