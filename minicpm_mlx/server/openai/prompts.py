"""Prompts as the completions and embeddings API take them: text, ids, or lists of either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Discriminator, Field, Tag

from ..http.api_error import ApiError
from ..parameters import compute

if TYPE_CHECKING:
    from ..service import Service

MAX_PROMPTS = 256
"""Of one request."""

TokenIds = list[int]


def _kind(value: object) -> str | None:
    """Which of the four it is, so that a mistake is told of that one alone."""
    if isinstance(value, str):
        return "(text)"
    if not isinstance(value, list):
        return None
    first = value[0] if value else None
    if isinstance(first, str):
        return "(texts)"
    return "(lists of ids)" if isinstance(first, list) else "(ids)"


Prompts = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[str], Field(max_length=MAX_PROMPTS), Tag("(texts)")]
    | Annotated[TokenIds, Tag("(ids)")]
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS), Tag("(lists of ids)")],
    Discriminator(
        _kind,
        custom_error_type="prompts",
        custom_error_message="expected text, token ids, or a list of either",
    ),
]


@dataclass(frozen=True)
class Prompt:
    """What is to be read."""

    service: Service
    ids: Sequence[int]
    given: str | None = None
    """The text it came as."""

    def text(self) -> str:
        """It as text."""
        return self.service.lm.tokenizer.decode(self.ids) if self.given is None else self.given


async def read_prompts(
    service: Service,
    given: str | Sequence[str] | TokenIds | Sequence[TokenIds],
    field: str,
    adds_bos: bool = True,
) -> list[Prompt]:
    """Each of the prompts; ApiError where there is none, or one is empty."""
    lone = isinstance(given, str) or not given or isinstance(given[0], int)
    many = [given] if lone else given
    found = await compute(lambda: [_read(service, one, field, adds_bos) for one in many], field)
    if not all(prompt.ids for prompt in found):
        raise ApiError(400, f"{field}: expected text or token ids, got an empty one", field=field)
    return found


def _read(service: Service, given: object, field: str, adds_bos: bool) -> Prompt:
    if isinstance(given, str):
        ids = service.encode(given) if adds_bos else service.lm.tokenizer.encode(given, False)
        return Prompt(service, ids, given)
    assert isinstance(given, list)
    return Prompt(service, service.check_ids(given, field))
