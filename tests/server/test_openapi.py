"""Requests made up from the server's own document: answers are as it says, and none fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

if TYPE_CHECKING:
    from support.serving import Live

pytest.importorskip("fastapi")
schemathesis = pytest.importorskip("schemathesis")

Serving = Callable[..., AbstractContextManager["Live"]]
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
def brief(serving: Serving) -> Iterator[Live]:
    """A server that soon gives replies up: most requests set them no end."""
    with serving(timeout=0.3) as live:
        yield live


def probe(live: Live, examples: int, seconds: float) -> int:
    """Ask every route with valid and invalid requests, for about so long; how many were sent."""
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
                    case.body["model"] = "demo"  # of which there is one in a world of strings
                case.call_and_validate(base_url=live.url, checks=wanted, timeout=60)

        return ask

    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    for operation in operations:
        for mode in modes if operation.body else modes[:1]:
            asks(operation, mode)()
    return sent


def test_answers_to_made_up_requests_are_as_documented(brief: Live) -> None:
    sent = probe(brief, examples=6, seconds=40)
    assert sent > 100
    assert brief.ask("GET", "/health").status == 200


@pytest.mark.long
def test_answers_to_many_made_up_requests_are_as_documented(brief: Live) -> None:
    probe(brief, examples=200, seconds=400)
    assert brief.ask("GET", "/health").status == 200
