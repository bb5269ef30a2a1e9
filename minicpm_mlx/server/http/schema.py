"""The base class of request bodies, and annotations for fields that are ignored or refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .api_error import ApiError

T = TypeVar("T")
Part = TypeVar("Part")

TEXT_ONLY_INPUT = "this model reads only text"
TEXT_ONLY_OUTPUT = "this model writes only text"
NO_REASONING = "this model does not reason before it replies"

Ignored = Annotated[T | None, Field(description="Accepted without effect.")]
"""A field that other servers know and that changes nothing here."""

OFF: tuple[Any, ...] = (False, 0, "", [])
"""Values that ask for nothing. An empty object is not among them: for several fields of OpenAI's
API it turns a feature on."""


def refused(reason: str, allowed: Sequence[Any] = OFF) -> AfterValidator:
    """Marks a field that is known but not supported; None and the `allowed` values are accepted.

    The error becomes an ApiError with code "unsupported" that gives the field and `reason`.
    """

    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            raise PydanticCustomError("unsupported", reason)
        return value

    return AfterValidator(check)


def parse_object(text: str, name: str, field: str) -> dict[str, Any]:
    """`text` as a JSON object; an ApiError for `field` that calls it `name`."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ApiError(f"{name} must be a JSON object as text", field=field)
    return parsed


class Body(BaseModel):
    """A request's body. Undeclared fields are refused, not ignored."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="after")
    def _check_fields(self) -> Any:
        self.check()
        return self

    def check(self) -> None:
        """Checks fields against each other once each is valid by itself; may raise ApiError."""


class UnsupportedPart(Body):
    """A part of a message that is not text. Declared so that its error can say so."""

    model_config = ConfigDict(extra="ignore")

    type: str

    def check(self) -> None:
        raise PydanticCustomError("unsupported", f"{TEXT_ONLY_INPUT}, got {self.type}")


def _text_or_parts(value: object) -> str | None:
    if isinstance(value, str):
        return "(text)"
    return "(parts)" if isinstance(value, list) else None


TextOrParts = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[Part], Tag("(parts)")],
    Discriminator(
        _text_or_parts,
        custom_error_type="text_or_parts",
        custom_error_message="expected text, or a list of parts",
    ),
]
"""A message's content. The tags keep errors in a part apart from errors in the union."""


def join_text(content: Any, separator: str = "") -> str:
    """The text of a message's content."""
    if content is None or isinstance(content, str):
        return content or ""
    return separator.join(part.text for part in content)
