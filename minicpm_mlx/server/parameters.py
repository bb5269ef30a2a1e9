"""Request fields that several APIs share: sampling, stop strings, grammars."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field

from ..engine import Grammar, Sampling
from ..errors import MiniCPMError
from ..text.chat_prompt import ChatPrompt
from .http.api_error import ApiError
from .http.schema import Body, Ignored
from .reply_stream import GenerationRequest
from .service import Service

T = TypeVar("T")

MAX_STOPS = 16
"""Stop strings of a request: OpenAI takes 4, some tasks of lm-eval send more."""

StopString = Annotated[str, Field(min_length=1, max_length=1024)]
StopStrings = Annotated[list[StopString], Field(max_length=MAX_STOPS)]
TopLogprobs = Annotated[int, Field(ge=0, le=20)]
SignedSeed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class LogprobFields(Body):
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(
                "top_logprobs goes with logprobs: true; set that too", field="top_logprobs"
            )

    def wanted_logprobs(self) -> int | None:
        """`top_logprobs` of the GenerationRequest."""
        return (self.top_logprobs or 0) if self.logprobs else None


class SamplingFields(Body):
    """Fields of every API; None is the model's default. `Sampling` checks the ranges."""

    own_names: ClassVar[Mapping[str, str]] = {}
    """Names in this API of fields of `Sampling`, where they differ."""

    temperature: float | None = None
    top_p: float | None = None

    def sampling(self, service: Service, prompt: ChatPrompt, **changes: Any) -> Sampling:
        """The model's default sampling for `prompt` with this body's fields and `changes`."""
        fields = self.model_dump(include={*Sampling.__dataclass_fields__})
        return service.sampling(self.own_names, prompt, **fields | changes)


class LocalSamplingFields(SamplingFields):
    """The further fields of Ollama, vLLM and SGLang."""

    top_k: Annotated[int, Field(ge=-1)] | None = None
    """-1 and 0 keep all tokens."""
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None

    def sampling(self, service: Service, prompt: ChatPrompt, **changes: Any) -> Sampling:
        top_k = None if self.top_k is None else max(self.top_k, 0)
        return super().sampling(service, prompt, **{"top_k": top_k, **changes})


class CompletionFields(LocalSamplingFields):
    """The fields of vLLM's OpenAI API and of SGLang."""

    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    """Token ids, as text, and the values added to their logits: -100 to 100."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """Replies to each prompt. Reply number i of a request with a seed uses seed + i."""
    stop: StopString | StopStrings | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=128)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: Ignored[bool] = None

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def generation(
        self,
        service: Service,
        *,
        prompt: ChatPrompt,
        seed: int | None,
        prefix: str = "",
        **fields: Any,
    ) -> GenerationRequest:
        """A request for one reply; `prefix` is where the body has these fields."""
        bias = self.logit_bias and _parse_logit_bias(
            service, self.logit_bias, f"{prefix}logit_bias"
        )
        common: dict[str, Any] = {
            "prompt": prompt,
            "sampling": self.sampling(service, prompt, seed=seed, logit_bias=bias),
            "stop": self.stops(),
            "stop_tokens": service.check_ids(self.stop_token_ids or [], f"{prefix}stop_token_ids"),
            "ignore_eos": bool(self.ignore_eos),
            "keep_special": self.skip_special_tokens is False,
        }
        return GenerationRequest(**common | fields)


def _parse_logit_bias(service: Service, bias: Mapping[str, float], field: str) -> dict[int, float]:
    for token in bias:
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise ApiError(f"{field} must name token ids, got {token[:40]!r}", field=field)
    ids = service.check_ids([int(token) for token in bias], field)
    return dict(zip(ids, bias.values(), strict=True))


def repeat(
    request: GenerationRequest, count: int, grammar: Grammar | None
) -> list[GenerationRequest]:
    """`count` requests that differ in their seeds. Each has its own grammar, which keeps state."""
    sampling = request.sampling
    seeds = [None if sampling.seed is None else (sampling.seed + i) % 2**64 for i in range(count)]
    return [
        replace(
            request,
            sampling=replace(sampling, seed=seed),
            grammar=None if grammar is None else grammar.copy(),
        )
        for seed in seeds
    ]


def lark_choice(texts: Sequence[str]) -> str:
    """A Lark expression for one of these texts."""
    return " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


async def compile_grammar(service: Service, guide: Mapping[str, Any], field: str) -> Grammar | None:
    """The grammar of `guide`; compiled on another thread, because a large one takes a while."""
    if not guide:
        return None
    if len(guide) > 1:
        raise ApiError(f"{field} gives {len(guide)} formats at once; give one", field=field)
    from ..lm.structured.grammar import grammar_of

    try:
        return await run_in_thread(lambda: grammar_of(service.lm.tokenizer, **guide), field)
    except ApiError as error:  # the field is in the message too: not all APIs have a place for it
        raise ApiError(f"{field}: {error.message}", field=field) from None


async def compile_only_grammar(
    service: Service, guides: Mapping[str, Mapping[str, Any]]
) -> Grammar | None:
    """The grammar of the only field in `guides`, if there is one; ApiError for several fields."""
    if not guides:
        return None
    field, *others = guides
    if others:
        raise ApiError(f"{', '.join(guides)} exclude each other; give one", field=others[-1])
    return await compile_grammar(service, guides[field], field)


async def run_in_thread(work: Callable[[], T], field: str) -> T:
    """The result of `work` on another thread; the library's own errors become ApiErrors."""
    try:
        return await asyncio.to_thread(work)
    except MiniCPMError as error:
        raise ApiError(str(error), field=field) from error
