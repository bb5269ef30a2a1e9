"""Forms that a reply can be held to: fields of OpenAI, vLLM, SGLang and llama.cpp."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ..http.api_error import ApiError
from ..http.schema import Body, Ignored, OneOf, parse_object, refused
from ..parameters import StopString, lark_choice

Guide = dict[str, Any]
"""Arguments of `compile_grammar`; none is any text."""

Choices = Annotated[list[StopString], Field(min_length=1)]
"""The reply is one of these."""
SchemaOrText = dict[str, Any] | str
"""A JSON schema that the reply follows, or its text."""

_OWN_SPACE = "the model chooses among the white space that JSON allows"


class TextFormat(Body):
    type: Literal["text"]

    def guide(self) -> Guide:
        return {}


class JsonObject(Body):
    """Any JSON object."""

    type: Literal["json_object"]
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    """llama.cpp's: a JSON schema that the reply follows."""

    def guide(self) -> Guide:
        return {"json_object": True} if self.schema_ is None else {"json_schema": self.schema_}


class JsonSchema(Body):
    name: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None
    """Accepted: the reply always follows the schema."""

    def guide(self) -> Guide:
        return {"json_schema": self.schema_}


class NestedSchema(Body):
    """A schema in the chat API."""

    type: Literal["json_schema"]
    json_schema: JsonSchema

    def guide(self) -> Guide:
        return self.json_schema.guide()


class FlatSchema(JsonSchema):
    """A schema in the responses API."""

    type: Literal["json_schema"]


ResponseFormat = Annotated[TextFormat | JsonObject | NestedSchema, OneOf("type")]
TextOptionsFormat = Annotated[TextFormat | JsonObject | FlatSchema, OneOf("type")]


class StructuredOutputs(Body):
    """vLLM's forms; give one."""

    json_: Annotated[SchemaOrText | None, Field(alias="json")] = None
    json_object: bool | None = None
    """Any JSON object."""
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    """In Lark's form or as GBNF."""
    disable_additional_properties: bool | None = None
    """Objects have only the properties that the schema names, unless it says otherwise."""
    disable_fallback: Ignored[bool] = None
    disable_any_whitespace: Annotated[bool | None, refused(_OWN_SPACE)] = None
    whitespace_pattern: Annotated[str | None, refused(_OWN_SPACE)] = None
    structural_tag: Annotated[str | None, refused("use json, regex, choice or grammar")] = None

    def guides(self) -> dict[str, Guide]:
        """The form by field; ApiError unless there is one."""
        forms = {
            "json": self.json_,
            "json_object": self.json_object or None,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
        }
        names = [name for name, value in forms.items() if value is not None]
        if len(names) != 1:
            raise ApiError(
                f"structured_outputs must have one of {', '.join(forms)}, "
                f"got {' and '.join(names) or 'none'}",
                field="structured_outputs",
            )
        field = f"structured_outputs.{names[0]}"
        guide = _guide(field, names[0], forms[names[0]])
        if self.disable_additional_properties and "json_schema" in guide:
            guide = {"closed_schema": guide["json_schema"]}
        return {field: guide}


class FormFields(Body):
    """Fields of chat and completions; give one."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    """vLLM's."""
    guided_json: SchemaOrText | None = None
    """vLLM's older fields."""
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    """A grammar that the reply follows, in Lark's form or as GBNF."""
    regex: str | None = None
    """SGLang's, like ebnf."""
    ebnf: str | None = None
    json_schema: SchemaOrText | None = None
    """SGLang's and llama.cpp's."""
    grammar: str | None = None
    """llama.cpp's."""

    def guides(self) -> dict[str, Guide]:
        """The forms by field; several exclude each other. Clients send empty text for none."""
        names = ["regex", "ebnf", "json_schema", "grammar"]
        names += ["guided_json", "guided_regex", "guided_choice", "guided_grammar"]
        guides = {
            name: _guide(name, name.removeprefix("guided_"), value)
            for name in names
            if (value := getattr(self, name)) not in (None, "")
        }
        if self.structured_outputs:
            guides |= self.structured_outputs.guides()
        if self.response_format and (guide := self.response_format.guide()):
            guides["response_format"] = guide
        return guides


def _guide(field: str, kind: str, value: Any) -> Guide:
    if kind in ("json", "json_schema"):
        return {"json_schema": parse_object(value, field) if isinstance(value, str) else value}
    if kind == "json_object":
        return {"json_object": True}
    if kind == "choice":
        return {"ebnf": f"start: {lark_choice(value)}"}
    return {"regex" if kind == "regex" else "ebnf": value}
