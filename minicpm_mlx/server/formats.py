"""The forms that a client may want a reply in: text, JSON, JSON of a schema."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .http.streaming import Body


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
