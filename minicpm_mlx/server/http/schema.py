"""The base class of request bodies, and annotations for fields that are ignored or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    Tag,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from .api_error import ApiError

T = TypeVar("T")
Part = TypeVar("Part")

TEXT_ONLY_INPUT = "this model reads only text"
TEXT_ONLY_OUTPUT = "this model writes only text"

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


def parse_object(text: str, field: str) -> dict[str, Any]:
    """`text` as a JSON object; an ApiError that names `field` if it is none."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise ApiError(f"{field} must be a JSON object as text", field=field)
    return parsed


class Body(BaseModel):
    """A request's body, or an object in it. Undeclared fields are refused, unless they are null."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def is_echo(cls, values: Mapping[str, Any]) -> bool:
        """Whether these are of an earlier reply or of a call's result, sent back by the client.

        Servers and clients note things there that no model reads, so undeclared fields are
        accepted without effect.
        """
        return False

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, values: Any) -> Any:
        """The fields without those that are undeclared and have no effect."""
        if not isinstance(values, dict):
            return values
        declared = {field.alias or name for name, field in cls.model_fields.items()}
        return {
            name: value
            for name, value in values.items()
            if name in declared or (value is not None and not cls.is_echo(values))
        }

    @model_validator(mode="after")
    def _check_fields(self) -> Any:
        self.check()
        return self

    def check(self) -> None:
        """Checks fields against each other once each is valid by itself; may raise ApiError."""


class Echo(Body):
    """A part of an earlier reply, or of a call's result."""

    @classmethod
    def is_echo(cls, values: Mapping[str, Any]) -> bool:
        return True


class OneOf:
    """Annotates a union of bodies that the text in `field` tells apart.

    The branches have names in parentheses, so that in the path of an error none of them looks like
    a field: a part of type "text" has a field "text" too.
    """

    def __init__(self, field: str):
        self.field = field

    def _tag(self, value: Any) -> str | None:
        text = value.get(self.field) if isinstance(value, dict) else None
        return f"({text})" if isinstance(text, str) else None

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        branches: dict[str, type[BaseModel]] = {
            text: body
            for body in get_args(source)
            for text in get_args(body.model_fields[self.field].annotation)
        }
        return core_schema.tagged_union_schema(
            {f"({text})": handler.generate_schema(body) for text, body in branches.items()},
            self._tag,
            custom_error_type="one_of",
            custom_error_message=f"expected {self.field} to be one of: {', '.join(branches)}",
        )


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
