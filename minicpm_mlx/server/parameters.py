"""TODO."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import Field

from ..engine.grammar import Grammar
from ..errors import MiniCPMError
from .http.api_error import ApiError, unsupported

if TYPE_CHECKING:
    from .service import Service


T = TypeVar("T")


MAX_STOPS = 16
"""Stop strings of a request: OpenAI takes 4, some tasks of lm-eval send more."""


StopString = Annotated[str, Field(min_length=1, max_length=1024)]


Stop = StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)]


def bias_of(service: Service, given: Mapping[str, float], field: str) -> dict[int, float]:
    """`logit_bias`, which the API calls `field`, with numbers for keys."""
    for token in given:
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise ApiError(400, f"{field} must name token ids, got {token[:40]!r}", field=field)
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
        raise ApiError(400, f"{field} gives {len(guide)} formats at once; give one", field=field)
    from ..lm.structured.guide import grammar_of as compiled

    try:
        return await compute(lambda: compiled(service.lm.tokenizer, **guide), field)
    except ApiError as refusal:  # the field is in the message too: not all APIs have a place for it
        raise ApiError(400, f"{field}: {refusal.message}", field=field) from None


async def grammar_of_one(
    service: Service, guides: Mapping[str, Mapping[str, Any]]
) -> Grammar | None:
    """The grammar of the one field of `guides` that gives a form, if any does."""
    if not guides:
        return None
    field, *others = guides
    if others:
        raise ApiError(
            400, f"{', '.join(guides)} cannot be had together; give one", field=others[-1]
        )
    return await grammar_of(service, guides[field], field)


async def compute(work: Callable[[], T], field: str) -> T:
    """What `work` comes to on another thread; our own errors are told of `field`."""
    try:
        return await asyncio.to_thread(work)
    except MiniCPMError as error:
        raise ApiError(400, str(error), field=field) from error


def refuse_all(fields: Mapping[str, tuple[Any, str]]) -> None:
    """Refuse the first field whose value is set, with its reason."""
    for field, (value, why) in fields.items():
        if value or value == {}:  # an empty object asks for what it is for
            raise unsupported(field, why)
