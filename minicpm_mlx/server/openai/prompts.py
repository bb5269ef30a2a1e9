"""Prompts of the completions and embeddings API: text, ids, or lists of either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Discriminator, Field, Tag

from ..http.api_error import ApiError
from ..parameters import run_in_thread
from ..service import Service

MAX_PROMPTS = 256
"""Prompts of one request, at most."""

TokenIds = list[int]


def _kind(value: object) -> str | None:
    """The branch of the union, so that errors are those of one branch."""
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
    """Token ids, and the text they come from."""

    service: Service
    ids: Sequence[int]
    source: str | None = None
    """None: the request had ids."""

    def text(self) -> str:
        return self.service.lm.tokenizer.decode(self.ids) if self.source is None else self.source


async def read_prompts(
    service: Service,
    prompts: str | Sequence[str] | TokenIds | Sequence[TokenIds],
    field: str,
    adds_bos: bool = True,
) -> list[Prompt]:
    """Encodes the prompts; ApiError if there is none, or one is empty."""
    single = isinstance(prompts, str) or not prompts or isinstance(prompts[0], int)
    sources = [prompts] if single else prompts
    encoded = await run_in_thread(
        lambda: [_read(service, source, field, adds_bos) for source in sources], field
    )
    if not all(prompt.ids for prompt in encoded):
        message = f"{field}: expected text or token ids, got an empty prompt"
        raise ApiError(message, field=field)
    return encoded


def _read(service: Service, source: object, field: str, adds_bos: bool) -> Prompt:
    if isinstance(source, str):
        ids = service.encode(source) if adds_bos else service.lm.tokenizer.encode(source, False)
        return Prompt(service, ids, source)
    assert isinstance(source, list)
    return Prompt(service, service.check_ids(source, field))
