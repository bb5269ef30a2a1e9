"""Requests made up from the server's own document: answers are as it says, and none fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

import minicpm_mlx as mm
from support.apis import SMALL, merged

if TYPE_CHECKING:
    from support.serving import Live

pytest.importorskip("fastapi")


CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)

PLAIN = ("/flush_cache", "/health_generate")
"""Routes that answer in plain text or with nothing, as SGLang's do."""


@pytest.fixture(scope="module")
def brief(tiny: mm.LM) -> Iterator[Live]:
    """A server that soon gives replies up: most requests set them no end."""
    from support.serving import serving

    with serving(tiny, timeout=0.3) as live:
        yield live


def probe(live: Live, examples: int, seconds: float) -> int:
    """Ask every route with valid and invalid requests, for about so long; how many were sent."""
    schemathesis = pytest.importorskip("schemathesis")
    schemathesis.checks.load_all_checks()
    wanted = [schemathesis.checks.CHECKS.get_one(name) for name in CHECKS]
    schema = schemathesis.openapi.from_dict(live.ask("GET", "/openapi.json").json)
    found = [one.ok() for one in schema.get_all_operations()]
    operations = [one for one in found if one.path not in PLAIN]
    assert len(operations) > 20
    how = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    sent = 0

    def asks(operation: Any, mode: Any) -> Callable[[], None]:
        until = float("inf")

        @how
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            nonlocal sent, until
            until = min(until, time.monotonic() + seconds / len(operations) / 2)
            if time.monotonic() <= until:
                sent += 1
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = "tiny"  # of which there is one in a world of strings
                case.call_and_validate(base_url=live.url, checks=wanted, timeout=60)

        return ask

    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    for operation in operations:
        for mode in modes if operation.body else modes[:1]:
            asks(operation, mode)()
    return sent


@pytest.mark.slow
def test_answers_to_made_up_requests_are_as_documented(brief: Live) -> None:
    sent = probe(brief, examples=6, seconds=15)
    assert sent > 40
    assert brief.ask("GET", "/health").status == 200


@pytest.mark.long
def test_answers_to_many_made_up_requests_are_as_documented(brief: Live) -> None:
    probe(brief, examples=200, seconds=400)
    assert brief.ask("GET", "/health").status == 200


# Declared limits

SAMPLED: dict[str, list[float]] = {
    "temperature": [-0.1, 100.1],
    "top_p": [0.0, 1.1],
    "min_p": [-0.1, 1.1],
    "frequency_penalty": [-2.1, 2.1],
    "presence_penalty": [-2.1, 2.1],
    "repetition_penalty": [0.0],
}
"""Values just outside the limits of the sampler."""
KINDS: dict[str, list[Any]] = {
    "boolean": [True],
    "integer": [1],
    "number": [1.5],
    "string": ["text"],
    "array": [[{"x": 1}], [[["x"]]]],
    "object": [{"x": 1}],
}


def forbidden(shape: dict[str, Any], document: dict[str, Any]) -> Iterator[tuple[list[str], Any]]:
    """Fields of an object, and of optional objects in it, with values that its schema forbids."""
    for name, field in shape["properties"].items():
        branches = [resolved(one, document) for one in field.get("anyOf", [field])]
        branches = [inner for one in branches for inner in one.get("oneOf", [one])]
        branches = [resolved(one, document) for one in branches]
        kinds = {one.get("type") for one in branches}
        kinds |= {"integer"} if "number" in kinds else set()
        if not {None, "enum"} & kinds:
            yield from (([name], value) for kind in KINDS.keys() - kinds for value in KINDS[kind])
        for one in branches:
            yield from (([name], value) for value in outside(one, only=len(kinds - {"null"}) == 1))
            if one.get("properties") and not one.get("required"):
                yield from (([name, *rest], value) for rest, value in forbidden(one, document))
        yield from (([name], value) for value in SAMPLED.get(name, ()))


def outside(shape: dict[str, Any], only: bool) -> Iterator[Any]:
    """Values just outside the limits of one branch of a field."""
    if "minimum" in shape:
        yield shape["minimum"] - 1
    if "maximum" in shape:
        yield shape["maximum"] + 1
    if "exclusiveMaximum" in shape:
        yield shape["exclusiveMaximum"]
    if only and "enum" in shape:
        yield "no such value"
    if shape.get("minLength"):
        yield ""
    if only and shape.get("minItems"):
        yield []
    if "maxItems" in shape:
        yield [KINDS[shape["items"].get("type", "string")][0]] * (shape["maxItems"] + 1)


def resolved(shape: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    name = shape.get("$ref", "").rpartition("/")[2]
    return document["components"]["schemas"][name] if name else shape


@pytest.mark.parametrize("path", SMALL)
def test_a_value_that_the_document_forbids_is_refused_by_name(tiny_server: Live, path: str) -> None:
    document = tiny_server.ask("GET", "/openapi.json").json
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    count = 0
    fields = forbidden(resolved(content["schema"], document), document)
    for (*parents, name), value in (*fields, (["no_such_field"], 1)):
        if path == "/api/embed" and name in SAMPLED:
            continue  # nothing is sampled
        more: Any = {name: value}
        for parent in reversed(parents):
            more = {parent: more}
        answer = tiny_server.ask("POST", path, merged(SMALL[path], more))
        count += 1
        assert answer.status == 400, (more, answer.body)
        assert name in answer.body.decode(), (more, answer.body)
    assert count > len(SMALL[path])
