"""The service as Python calls it: what routes build on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

import minicpm_mlx as mm
from minicpm_mlx.text.chat_prompt import ChatPrompt

pytest.importorskip("fastapi", reason="the server's packages are not installed: [serve]")

from minicpm_mlx.server.service import GenerationRequest, Service

PROMPTS = [
    "The capital of France is",
    "One, two, three, four,",
    "def add(a, b):\n",
    "Water boils at",
    "Once upon a time there was",
    "The sun is",
    "Dear Sir or Madam,",
    "In 1999 the",
]


@pytest.fixture(scope="module")
def service(tiny: mm.LM) -> Iterator[Service]:
    found = Service(tiny)
    yield found
    asyncio.run(found.close())


def ask(service: Service, text: str, count: int = 12, **options: Any) -> GenerationRequest:
    how = service.sampling(**options.pop("sampling", {}))
    ids = service.encode(text)
    return GenerationRequest(
        prompt=ChatPrompt(ids=ids),
        served=service.find_model(None),
        sampling=how,
        max_tokens=count,
        **options,
    )


def test_eight_different_requests_at_once_are_answered_as_alone(service: Service) -> None:
    ways: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 7}, {"repetition_penalty": 1.3}]
    stops = [(), (",",), (" the", " in"), ("\n\n",)]
    asks = [
        ask(service, text, 16, sampling=ways[i % 3], stop=stops[i % 4])
        for i, text in enumerate(PROMPTS)
    ]

    async def run() -> list[Any]:
        return await service.start(asks).whole()

    for one, text, got in zip(asks, PROMPTS, asyncio.run(run()), strict=True):
        alone = service.lm.generate(text, max_tokens=16, sampling=one.sampling, stop=one.stop)
        assert got.text == alone.text
        assert got.finish_reason == alone.finish_reason
        assert tuple(token.token for token in got.tokens) == alone.token_ids
        assert (got.stopped_by is not None) == (got.stopped_by in one.stop)


@pytest.mark.parametrize("way", ["close", "drop", "cancel"])
def test_replies_that_nobody_waits_for_free_their_place_at_once(service: Service, way: str) -> None:
    async def run() -> float:
        replies = service.start([ask(service, "Count:", 4000, ignore_eos=True)])
        async for _ in replies:
            break
        start = time.monotonic()
        if way == "close":
            replies.close()
        elif way == "drop":
            del replies
        else:
            task = asyncio.ensure_future(replies.whole())
            await asyncio.sleep(0.01)
            start = time.monotonic()
            task.cancel()
        await asyncio.sleep(0)
        while service.state()["running"]:
            assert time.monotonic() < start + 20
            await asyncio.sleep(0.002)
        return time.monotonic() - start

    asyncio.run(run())
