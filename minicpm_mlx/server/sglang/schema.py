"""What SGLang's /generate is sent, and the replies that it asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field

from ...engine.grammar import Grammar
from ..http.api_error import ApiError, unsupported
from ..http.streaming import Body
from ..parameters import Stop, bias_of, grammar_of_one

if TYPE_CHECKING:
    from ..service import GenerationRequest, ServedModel, Service

T = TypeVar("T")

Count = Annotated[int, Field(ge=0)]
Ids = list[int]


class SamplingParams(Body):
    """None is the model's default."""

    max_new_tokens: Count | None = 128
    """0: the prompt is only read. None: as far as the context goes."""
    min_new_tokens: Count = 0
    n: Annotated[int, Field(ge=1, le=128)] = 1
    """Replies to each prompt; number i of a request with a seed is drawn with seed + i."""
    stop: Stop | None = None
    stop_token_ids: Annotated[Ids, Field(max_length=128)] | None = None
    ignore_eos: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """-1 keeps all tokens."""
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    """Token ids, as text, and what is added to their logits: -100 to 100."""
    sampling_seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None
    regex: str | None = None
    """A regular expression that the whole reply follows."""
    json_schema: str | None = None
    """The text of a JSON schema that the reply follows."""
    ebnf: str | None = None
    """A grammar that the reply follows."""
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    """Accepted without effect: no spaces are put in."""
    stream_interval: Annotated[int, Field(ge=1)] | None = None
    """Accepted without effect: every token is told as it comes."""

    no_stop_trim: bool = False
    structural_tag: str | None = None
    custom_params: dict[str, Any] | None = None

    def check(self) -> None:
        """Refuse what would change the reply and cannot be honoured."""
        for name, why in (
            ("no_stop_trim", "a reply ends before its stop string"),
            ("structural_tag", "use regex, json_schema or ebnf"),
            ("custom_params", "no code of requests is run here"),
        ):
            if getattr(self, name):
                raise unsupported(f"sampling_params.{name}", why)
        if self.top_k == 0:
            raise ApiError(
                400,
                "top_k must be -1 (all tokens) or at least 1, got 0",
                field="sampling_params.top_k",
            )

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def guides(self) -> dict[str, dict[str, Any]]:
        """How the reply is constrained, by field, as arguments of `grammar_of`."""
        names = ("regex", "json_schema", "ebnf")
        given = {name: getattr(self, name) for name in names}
        found = {name: {name: value} for name, value in given.items() if value is not None}
        if self.json_schema == "$$ANY$$":  # SGLang's word for any object
            found["json_schema"] = {"json_object": True}
        elif self.json_schema is not None:
            found["json_schema"] = {"json_schema": _object(self.json_schema)}
        return {f"sampling_params.{name}": guide for name, guide in found.items()}


@dataclass(frozen=True, kw_only=True)
class SGLangPrompt:
    """A reply that is wanted, and what the answer says of it."""

    ask: GenerationRequest
    id: str | None
    """The client's own name for it."""
    with_text: bool
    """Log probabilities come with their tokens' text."""


class SGLangGenerateBody(Body):
    text: str | Annotated[list[str], Field(min_length=1)] | None = None
    input_ids: (
        Annotated[Ids, Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)] | None
    ) = None
    sampling_params: SamplingParams | list[SamplingParams] | None = None
    stream: bool = False
    rid: str | list[str] | None = None
    """Names for the answers."""
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    """Where in the prompt log probabilities begin; -1 is its last token."""
    top_logprobs_num: Count | list[Count] | None = None
    return_text_in_logprobs: bool = False
    lora_path: str | list[str | None] | None = None
    """Names of adapters that the server was started with."""

    log_metrics: bool = True
    """Accepted without effect."""
    modalities: list[str | None] | None = None
    """Accepted without effect: what they would be of is refused."""

    input_embeds: list[Any] | None = None
    image_data: str | dict[str, Any] | list[Any] | None = None
    audio_data: str | dict[str, Any] | list[Any] | None = None
    token_ids_logprob: list[Any] | None = None
    session_params: dict[str, Any] | list[dict[str, Any]] | None = None
    custom_logit_processor: str | list[str | None] | None = None
    return_hidden_states: bool = False
    bootstrap_host: str | list[str] | None = None
    bootstrap_port: int | list[int] | None = None
    bootstrap_room: int | list[int] | None = None

    @property
    def prompt_field(self) -> str:
        """Which field the prompts are in."""
        return "input_ids" if self.text is None else "text"

    @property
    def is_single(self) -> bool:
        """Whether one answer is wanted, not a list."""
        listed = self.text if self.text is not None else self.input_ids
        several = isinstance(listed, list) and isinstance(listed[0], str | list)
        return not several and all(one.n == 1 for one in self._given_params())

    def _given_params(self) -> Sequence[SamplingParams]:
        given = self.sampling_params
        return given if isinstance(given, list) else [given or SamplingParams()]

    def check(self) -> None:
        """Refuse what would change the answer and cannot be honoured."""
        if (self.text is None) == (self.input_ids is None):
            raise ApiError(400, "expected either text or input_ids", field="text")
        for name, why in (
            ("input_embeds", "send text or input_ids"),
            ("image_data", "this model reads text alone"),
            ("audio_data", "this model reads text alone"),
            ("token_ids_logprob", "top_logprobs_num gives those of the likeliest tokens"),
            ("session_params", "send the whole text; what was read before is reused"),
            ("custom_logit_processor", "no code of requests is run here"),
            ("return_hidden_states", "/v1/embeddings gives their mean"),
            ("bootstrap_host", "one server reads and writes"),
            ("bootstrap_port", "one server reads and writes"),
            ("bootstrap_room", "one server reads and writes"),
        ):
            if getattr(self, name):
                raise unsupported(name, why)

    async def prompts(self, service: Service) -> list[SGLangPrompt]:
        """Every reply that is wanted, those to one prompt together."""
        self.check()
        texts = self._texts(service)
        params = self._params(len(texts))
        grammars = await _grammars(service, params)
        logprobs = _each("return_logprob", self.return_logprob, len(texts), False)
        starts = _each("logprob_start_len", self.logprob_start_len, len(texts), None)
        tops = _each("top_logprobs_num", self.top_logprobs_num, len(texts), 0)
        adapters = _each("lora_path", self.lora_path, len(texts), None)
        names = self._names(len(texts) * params[0].n)
        found: list[SGLangPrompt] = []
        for i, ids in enumerate(texts):
            ask = _ask(service, params[i], ids, served=_served(service, adapters[i]))
            if logprobs[i]:
                start = _start(starts[i], ids, params[i])
                ask = replace(ask, top_logprobs=tops[i], score_from=start)
            for one in _copies(ask, params[i].n, grammars[i]):
                name = names[len(found)]
                found.append(SGLangPrompt(ask=one, id=name, with_text=self.return_text_in_logprobs))
        return found

    def _texts(self, service: Service) -> list[list[int]]:
        if self.text is not None:
            texts = [self.text] if isinstance(self.text, str) else self.text
            return [service.encode(text) for text in texts]
        given: Any = self.input_ids
        lists = [given] if isinstance(given[0], int) else given
        return [service.check_ids(ids, "input_ids") for ids in lists]

    def _params(self, count: int) -> list[SamplingParams]:
        found = _each("sampling_params", self.sampling_params, count, SamplingParams())
        for one in found:
            one.check()
            if one.n != found[0].n:
                raise ApiError(
                    400, "sampling_params: n must be the same for all", field="sampling_params"
                )
        return found

    def _names(self, count: int) -> list[str | None]:
        if isinstance(self.rid, str):
            return [self.rid if i == 0 else f"{self.rid}_{i}" for i in range(count)]
        return _each("rid", self.rid, count, None)


def _each(field: str, given: Any, count: int, default: T) -> list[T]:
    """A value for each of `count` prompts, from one for all of them or a list."""
    if not isinstance(given, list):
        return [default if given is None else given] * count
    if len(given) != count:
        raise ApiError(
            400,
            f"{field} must be one value or as many as there are prompts, {count}; got {len(given)}",
            field=field,
        )
    return given


async def _grammars(service: Service, params: Sequence[SamplingParams]) -> list[Grammar | None]:
    """What each reply must follow; built once where all have the same parameters."""
    made: dict[int, Grammar | None] = {}
    for one in params:
        if id(one) not in made:
            made[id(one)] = await grammar_of_one(service, one.guides())
    return [made[id(one)] for one in params]


def _ask(
    service: Service, params: SamplingParams, ids: list[int], served: ServedModel
) -> GenerationRequest:
    from ..service import GenerationRequest

    name, bias, ends = "sampling_params", params.logit_bias, params.stop_token_ids or []
    return GenerationRequest(
        prompt=ids,
        served=served,
        sampling=service.sampling(
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=None if params.top_k is None else max(params.top_k, 0),
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            logit_bias=None if bias is None else bias_of(service, bias, f"{name}.logit_bias"),
            seed=params.sampling_seed,
        ),
        max_tokens=params.max_new_tokens,
        min_tokens=params.min_new_tokens,
        stop=params.stops(),
        stop_tokens=service.check_ids(ends, f"{name}.stop_token_ids"),
        ignore_eos=params.ignore_eos,
        keep_special=not params.skip_special_tokens,
    )


def _copies(ask: GenerationRequest, count: int, grammar: Grammar | None) -> list[GenerationRequest]:
    """`count` asks that differ in their seeds; each has a grammar of its own."""
    sampling = ask.sampling
    seeds = [None if sampling.seed is None else (sampling.seed + i) % 2**64 for i in range(count)]
    return [
        replace(
            ask,
            sampling=replace(sampling, seed=seed),
            grammar=None if grammar is None else grammar.copy(),
        )
        for seed in seeds
    ]


def _start(given: int | None, ids: Sequence[int], params: SamplingParams) -> int:
    """The prompt's first token that is scored.

    SGLang's default is its last one. Where nothing is generated that would answer nothing, and its
    frontend expects the whole prompt (`unconditional_likelihood_normalized`).
    """
    if given is None:
        given = 0 if params.max_new_tokens == 0 else -1
    if not -1 <= given < max(len(ids), 1):
        raise ApiError(
            400,
            f"logprob_start_len must be -1 or below the prompt's {len(ids)} tokens, got {given}",
            field="logprob_start_len",
        )
    return len(ids) - 1 if given == -1 else given


def _served(service: Service, adapter: str | None) -> ServedModel:
    if adapter is None:
        return service.served(None)
    return service.served(f"{service.names[0].name}:{adapter}")


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ApiError(
            400,
            "json_schema must be the text of a JSON object",
            field="sampling_params.json_schema",
        )
    return found
