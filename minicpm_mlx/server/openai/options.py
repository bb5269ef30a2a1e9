"""The options that OpenAI's chat and completions API share, and those that vLLM adds to them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field

from ...engine import Sampling
from ...engine.grammar import Grammar
from ...errors import MiniCPMError
from ..http.api_error import Refusal, unsupported
from ..http.streaming import Body
from ..reply_stream import Ask

if TYPE_CHECKING:
    from ..service import Service

T = TypeVar("T")

MAX_STOPS = 16
"""Stop strings of a request: OpenAI takes 4, some tasks of lm-eval send more."""

StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Stop = StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)]


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted: padding against listeners on the way, of which a local server has none."""


class Options(Body):
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
            raise Refusal(
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

    def asks(self, service: Service, prompts: Sequence[Sequence[int]], **given: Any) -> list[Ask]:
        """`n` replies to each prompt, in order; `given` goes into each Ask."""
        sampling, count = self.sampling(service), self.n or 1
        seeds = [
            None if sampling.seed is None else (sampling.seed + i) % 2**64 for i in range(count)
        ]
        grammar: Grammar | None = given.pop("grammar", None)
        return [
            Ask(
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


def bias_of(service: Service, given: Mapping[str, float], field: str) -> dict[int, float]:
    """`logit_bias`, which the API calls `field`, with numbers for keys."""
    for token in given:
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise Refusal(400, f"{field} must name token ids, got {token[:40]!r}", field=field)
    ids = service.check_ids([int(token) for token in given], field)
    return dict(zip(ids, given.values(), strict=True))


def alternatives(texts: Sequence[str]) -> str:
    """Lark's way to say: one of these texts."""
    return " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


async def grammar_of(service: Service, guide: Mapping[str, Any], field: str) -> Grammar | None:
    """The grammar of `guide`; compiled on another thread, as a large one takes a while."""
    if not guide:
        return None
    if len(guide) > 1:
        raise Refusal(400, f"{field} gives {len(guide)} formats at once; give one", field=field)
    from ...lm.structured.guide import grammar_of as compiled

    try:
        return await compute(lambda: compiled(service.lm.tokenizer, **guide), field)
    except Refusal as refusal:  # the field is in the message too: not all APIs have a place for it
        raise Refusal(400, f"{field}: {refusal.message}", field=field) from None


async def grammar_of_one(
    service: Service, guides: Mapping[str, Mapping[str, Any]]
) -> Grammar | None:
    """The grammar of the one field of `guides` that gives a form, if any does."""
    if not guides:
        return None
    field, *others = guides
    if others:
        raise Refusal(
            400, f"{', '.join(guides)} cannot be had together; give one", field=others[-1]
        )
    return await grammar_of(service, guides[field], field)


async def compute(work: Callable[[], T], field: str) -> T:
    """What `work` comes to on another thread; our own errors are told of `field`."""
    try:
        return await asyncio.to_thread(work)
    except MiniCPMError as error:
        raise Refusal(400, str(error), field=field) from error


def refuse_all(fields: Mapping[str, tuple[Any, str]]) -> None:
    """Refuse the first field whose value is set, with its reason."""
    for field, (value, why) in fields.items():
        if value or value == {}:  # an empty object asks for what it is for
            raise unsupported(field, why)
