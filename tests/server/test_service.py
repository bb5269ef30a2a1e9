"""The service as Python calls it: what routes build on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import minicpm_mlx as mm

pytest.importorskip("fastapi", reason="the server's packages are not installed: [serve]")

from minicpm_mlx.server.http.api_error import ApiError
from minicpm_mlx.server.service import Chunk, GenerationRequest, Service

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
        prompt=ids, served=service.find_model(None), sampling=how, max_tokens=count, **options
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


def test_what_was_read_before_changes_no_reply(service: Service) -> None:
    long = "The quick brown fox jumps over the lazy dog. " * 12

    async def twice() -> list[Any]:
        await service.flush()
        return [(await service.start([ask(service, long)]).whole())[0] for _ in range(2)]

    fresh, again = asyncio.run(twice())
    assert fresh.text == again.text == service.lm.generate(long, max_tokens=12).text
    assert fresh.stats.cached_tokens == 0
    assert again.stats.cached_tokens == again.stats.prompt_tokens - 1


def test_parts_join_to_the_whole_and_observers_see_them(service: Service) -> None:
    seen: list[Chunk] = []
    service.observers.append(seen.append)

    async def run() -> list[Chunk]:
        replies = service.start([ask(service, text) for text in PROMPTS[:2]])
        async with replies:
            return [part async for part in replies]

    parts = asyncio.run(run())
    service.observers.remove(seen.append)
    assert seen == parts
    for index, text in enumerate(PROMPTS[:2]):
        mine = [part for part in parts if part.index == index]
        assert "".join(part.text for part in mine) == service.lm.generate(text, max_tokens=12).text
        assert [part.finish_reason for part in mine[:-1]] == [None] * (len(mine) - 1)


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


def test_embeddings_are_means_of_hidden_states_after_the_norm(service: Service) -> None:
    import mlx.core as mx

    texts = ["Hello there", "The quick brown fox jumps over the lazy dog. " * 20]
    ids = [service.encode(text) for text in texts]
    found = asyncio.run(service.embed(service.find_model(None), ids))
    reference = mm.load(str(service.lm.card.path), fuse=False)
    for one, vector in zip(ids, found, strict=True):
        model: Any = reference.model
        wanted = np.array(model.hidden(mx.array([one]))[0].mean(axis=0))
        np.testing.assert_allclose(vector, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "status", "code"),
    [
        ({"prompt": []}, 400, None),
        ({"prompt": [5] * 4096}, 400, "context_length_exceeded"),
        ({"prompt": [5] * 9000, "max_tokens": 0}, 400, "context_length_exceeded"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_it_waits(
    service: Service, wrong: dict[str, Any], status: int, code: str | None
) -> None:
    given: dict[str, Any] = {"max_tokens": 4} | wrong
    one = GenerationRequest(served=service.find_model(None), sampling=service.sampling(), **given)

    async def run() -> None:
        service.start([one])

    with pytest.raises(ApiError) as refused:
        asyncio.run(run())
    assert (refused.value.status, refused.value.code) == (status, code)


def test_names_are_those_the_operator_gave(service: Service) -> None:
    assert (
        service.find_model(None) == service.find_model("tiny") == service.find_model("tiny:latest")
    )
    for name in ("", "Tiny", "tiny:pirate", "../tiny", "/etc/passwd", "tiny:", "tiny\0"):
        with pytest.raises(ApiError, match="there is tiny") as refused:
            service.find_model(name)
        assert (refused.value.status, refused.value.code) == (404, "model_not_found")
