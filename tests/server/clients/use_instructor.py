"""Instructor in the modes that it has for each API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import instructor
from anthropic import Anthropic
from pydantic import BaseModel
from report import JSON, PERSON, URL, report


class Person(BaseModel):
    name: str
    age: int


def openai(mode: Any, text: str) -> Callable[[], Any]:
    def ask() -> Any:
        client = instructor.from_provider(
            "openai/scripted", base_url=f"{URL}/v1", api_key="none", mode=mode
        )
        return create(client, text)

    return ask


def create(client: Any, text: str, **more: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    asked = {"response_model": Person, "messages": messages, "max_retries": 1, **more}
    found = client.create(**asked).model_dump()
    asked["messages"] = [{"role": "user", "content": text.replace("Person", "PartialPerson")}]
    *_, last = client.create_partial(**asked)
    assert last.model_dump() == found, last
    return found


def by_anthropic() -> Any:
    client = instructor.from_anthropic(Anthropic(base_url=URL, api_key="none"))
    return create(client, PERSON, model="scripted", max_tokens=2000)


def by_ollama() -> Any:
    client = instructor.from_provider("ollama/scripted", base_url=f"{URL}/v1")
    return create(client, JSON)


report(
    "instructor",
    structure=openai(instructor.Mode.TOOLS, PERSON),
    structure_json=openai(instructor.Mode.JSON, JSON),
    structure_json_schema=openai(instructor.Mode.JSON_SCHEMA, JSON),
    structure_anthropic=by_anthropic,
    structure_ollama=by_ollama,
)
