"""The body of SGLang's /generate, and its requests for replies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, TypeAlias, TypeVar

from pydantic import Field

from ...engine import Grammar, Sampling
from ...text.chat_prompt import ChatPrompt
from ..http.api_error import ApiError
from ..http.schema import OFF, TEXT_ONLY_INPUT, Body, Ignored, parse_object, refused
from ..parameters import CompletionFields, compile_only_grammar, repeat
from ..reply_stream import GenerationRequest
from ..service import Service

T = TypeVar("T")

Count = Annotated[int, Field(ge=0)]
Ids = list[int]
OneOrList: TypeAlias = T | list[T]

_NO_CODE = "this server runs no code of requests"
_ONE_SERVER = "prefill and decode are on one server"
_EMPTY = (*OFF, {})
Media = Annotated[str | dict[str, Any] | list[Any] | None, refused(TEXT_ONLY_INPUT, _EMPTY)]


class SamplingParams(CompletionFields):
    """None is the model's default."""

    own_names: ClassVar[Mapping[str, str]] = {
        **{name: f"sampling_params.{name}" for name in Sampling.__dataclass_fields__},
        "seed": "sampling_params.sampling_seed",
    }

    max_new_tokens: Count | None = 128
    """0: the prompt is only read. None: as far as the context goes."""
    min_new_tokens: Count | None = None
    sampling_seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    regex: str | None = None
    """A regular expression that the whole reply follows."""
    json_schema: str | None = None
    """The text of a JSON schema that the reply follows."""
    ebnf: str | None = None
    """A grammar that the reply follows."""
    stream_interval: Annotated[int, Field(ge=1)] | None = None
    """Accepted without effect: every token is sent at once."""
    no_stop_trim: Annotated[bool | None, refused("a reply ends before its stop string")] = None
    structural_tag: Annotated[str | None, refused("use regex, json_schema or ebnf")] = None
    custom_params: Annotated[dict[str, Any] | None, refused(_NO_CODE, _EMPTY)] = None

    def check(self) -> None:
        if self.top_k == 0:
            raise ApiError(
                "sampling_params.top_k must be -1 (all tokens) or at least 1, got 0",
                field="sampling_params.top_k",
            )

    def guides(self) -> dict[str, dict[str, Any]]:
        """Arguments of `compile_grammar` by field."""
        values = {name: getattr(self, name) for name in ("regex", "json_schema", "ebnf")}
        guides = {name: {name: value} for name, value in values.items() if value is not None}
        if self.json_schema == "$$ANY$$":  # SGLang's name for any object
            guides["json_schema"] = {"json_object": True}
        elif self.json_schema is not None:
            field = "sampling_params.json_schema"
            guides["json_schema"] = {"json_schema": parse_object(self.json_schema, field)}
        return {f"sampling_params.{name}": guide for name, guide in guides.items()}


@dataclass(frozen=True, kw_only=True)
class SGLangPrompt:
    """A request for one reply, and options of its response."""

    generation: GenerationRequest
    id: str | None
    """The client's name for it."""
    with_text: bool
    """Log probabilities come with their tokens' text."""


class SGLangGenerateBody(Body):
    text: str | Annotated[list[str], Field(min_length=1)] | None = None
    input_ids: (
        Annotated[Ids, Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)] | None
    ) = None
    sampling_params: OneOrList[SamplingParams] | None = None
    stream: bool | None = None
    rid: OneOrList[str] | None = None
    """Names of the responses."""
    return_logprob: OneOrList[bool] | None = None
    logprob_start_len: OneOrList[int] | None = None
    """The first position of the prompt with log probabilities; -1 is its last token."""
    top_logprobs_num: OneOrList[Count] | None = None
    return_text_in_logprobs: bool | None = None
    lora_path: str | list[str | None] | None = None
    """Names of adapters that the server was started with."""
    log_metrics: Ignored[bool] = True
    modalities: list[str | None] | None = None
    """Accepted without effect: the data they describe is refused."""

    input_embeds: Annotated[list[Any] | None, refused("send text or input_ids")] = None
    image_data: Media = None
    audio_data: Media = None
    token_ids_logprob: Annotated[
        list[Any] | None, refused("top_logprobs_num gives those of the likeliest tokens")
    ] = None
    session_params: Annotated[
        OneOrList[dict[str, Any]] | None,
        refused("send the whole text; the prefix cache reuses its beginning", _EMPTY),
    ] = None
    custom_logit_processor: Annotated[str | list[str | None] | None, refused(_NO_CODE)] = None
    return_hidden_states: Annotated[bool | None, refused("/v1/embeddings gives their mean")] = None
    bootstrap_host: Annotated[OneOrList[str] | None, refused(_ONE_SERVER)] = None
    bootstrap_port: Annotated[OneOrList[int] | None, refused(_ONE_SERVER)] = None
    bootstrap_room: Annotated[OneOrList[int] | None, refused(_ONE_SERVER)] = None

    def check(self) -> None:
        if (self.text is None) == (self.input_ids is None):
            raise ApiError("expected either text or input_ids", field="text")

    @property
    def prompt_field(self) -> str:
        """The field that has the prompts."""
        return "input_ids" if self.text is None else "text"

    @property
    def is_single(self) -> bool:
        """Whether the response is one object, not a list."""
        prompts = self.text if self.text is not None else self.input_ids
        several = isinstance(prompts, list) and isinstance(prompts[0], str | list)
        params = self.sampling_params or SamplingParams()
        counts = [item.n for item in (params if isinstance(params, list) else [params])]
        return not several and all(count in (None, 1) for count in counts)

    async def prompts(self, service: Service) -> list[SGLangPrompt]:
        """All requests for replies; those for one prompt follow each other."""
        prompts = self._encode_prompts(service)
        params = self._params(len(prompts))
        grammars = await _compile_grammars(service, params)
        logprobs = _each("return_logprob", self.return_logprob, len(prompts), False)
        starts = _each("logprob_start_len", self.logprob_start_len, len(prompts), None)
        tops = _each("top_logprobs_num", self.top_logprobs_num, len(prompts), 0)
        adapters = _each("lora_path", self.lora_path, len(prompts), None)
        base = service.models[0].name
        generations: list[GenerationRequest] = []
        for i, ids in enumerate(prompts):
            generation = params[i].generation(
                service,
                seed=params[i].sampling_seed,
                prefix="sampling_params.",
                prompt=ChatPrompt(ids=ids),
                continues=True,
                served=service.find_model(adapters[i] and f"{base}:{adapters[i]}"),
                max_tokens=params[i].max_new_tokens,
                min_tokens=params[i].min_new_tokens or 0,
            )
            if logprobs[i]:
                start = _first_scored(starts[i], ids, params[i])
                generation = replace(generation, top_logprobs=tops[i], logprob_start=start)
            generations += repeat(generation, params[i].n or 1, grammars[i])
        names = self._names(len(generations))
        return [
            SGLangPrompt(
                generation=generation, id=name, with_text=bool(self.return_text_in_logprobs)
            )
            for generation, name in zip(generations, names, strict=True)
        ]

    def _encode_prompts(self, service: Service) -> list[list[int]]:
        if self.text is not None:
            texts = [self.text] if isinstance(self.text, str) else self.text
            return [service.encode(text) for text in texts]
        ids: Any = self.input_ids
        prompts = [ids] if isinstance(ids[0], int) else ids
        return [service.check_ids(prompt, "input_ids") for prompt in prompts]

    def _params(self, count: int) -> list[SamplingParams]:
        params = _each("sampling_params", self.sampling_params, count, SamplingParams())
        if len({item.n or 1 for item in params}) > 1:
            raise ApiError("sampling_params: n must be the same for all", field="sampling_params")
        return params

    def _names(self, count: int) -> list[str | None]:
        if isinstance(self.rid, str):
            return [self.rid if i == 0 else f"{self.rid}_{i}" for i in range(count)]
        return _each("rid", self.rid, count, None)


def _each(field: str, values: Any, count: int, default: T) -> list[T]:
    """A value for each of `count` prompts, from one value for all or a list."""
    if not isinstance(values, list):
        return [default if values is None else values] * count
    if len(values) != count:
        raise ApiError(
            f"{field} must be one value, or one for each of the {count} prompts; got {len(values)}",
            field=field,
        )
    return values


async def _compile_grammars(
    service: Service, params: Sequence[SamplingParams]
) -> list[Grammar | None]:
    """The grammar of each prompt, compiled once if all share the same parameters."""
    grammars: dict[int, Grammar | None] = {}
    for item in params:
        if id(item) not in grammars:
            grammars[id(item)] = await compile_only_grammar(service, item.guides())
    return [grammars[id(item)] for item in params]


def _first_scored(start: int | None, ids: Sequence[int], params: SamplingParams) -> int:
    """The first position of the prompt with log probabilities.

    SGLang's default is the last token. If nothing is generated, its frontend expects the whole
    prompt (`unconditional_likelihood_normalized`).
    """
    if start is None:
        start = 0 if params.max_new_tokens == 0 else -1
    if not -1 <= start < max(len(ids), 1):
        raise ApiError(
            f"logprob_start_len must be -1 or below the prompt's {len(ids)} tokens, got {start}",
            field="logprob_start_len",
        )
    return len(ids) - 1 if start == -1 else start
