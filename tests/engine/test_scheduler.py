"""Many requests on one device: each answered as alone, in the order they came, and none stuck."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import Queue
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from minicpm_mlx import load_model
from minicpm_mlx.engine import (
    Batch,
    ClosedError,
    NewToken,
    PrefillDone,
    PrefixCache,
    QueueFullError,
    Request,
    RequestEvent,
    RequestFailed,
    Sampling,
    Scheduler,
    generate,
)
from minicpm_mlx.errors import NumericsError
from support.data import GOLDEN

PROMPTS = [[1, 5, 9, 200, 31, 7], [4], [1, 300, *range(40, 75)], [9, 9], [1, 2, 3, 4, 5]]


class Ear:
    """Hears what a scheduler tells, by request."""

    def __init__(self) -> None:
        self.told: Queue[tuple[Request, RequestEvent]] = Queue()
        self.heard: dict[Request, list[RequestEvent]] = {}

    def __call__(self, told: list[tuple[Request, RequestEvent]]) -> None:
        for one in told:
            self.told.put(one)

    def next(self, seconds: float = 30) -> tuple[Request, RequestEvent]:
        request, event = self.told.get(timeout=seconds)
        self.heard.setdefault(request, []).append(event)
        return request, event

    def until_end(self, requests: Sequence[Request]) -> list[list[RequestEvent]]:
        """All that is said of requests, until each has ended."""
        while not all(ended(self.heard.get(one, [])) for one in requests):
            self.next()
        return [self.heard[one] for one in requests]


def ended(events: Sequence[RequestEvent]) -> bool:
    last = events[-1] if events else None
    return (
        isinstance(last, RequestFailed)
        or (isinstance(last, NewToken) and last.finish_reason is not None)
        or (isinstance(last, PrefillDone) and last.final)
    )


def tokens(events: Sequence[RequestEvent]) -> list[int]:
    return [event.token_logprob.token for event in events if isinstance(event, NewToken)]


def cached(events: Sequence[RequestEvent]) -> int:
    (read,) = (event for event in events if isinstance(event, PrefillDone))
    return read.cached_tokens


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(GOLDEN / "minicpm_2b_like", fuse=True)


@contextmanager
def running(model: Any, **options: Any) -> Iterator[tuple[Scheduler, Ear]]:
    ear = Ear()
    wanted = {
        "width": 4,
        "queue": 50,
        "max_positions": 10**6,
        "prefixes": PrefixCache(10**8),
    } | options
    models = wanted.pop("models", {None: model})
    scheduler = Scheduler(models, ear, vocab_size=model.config.vocab_size, **wanted)
    scheduler.start()
    try:
        yield scheduler, ear
    finally:
        scheduler.close(0)
        scheduler.join()


def ask(prompt: Sequence[int], count: int = 12, **options: Any) -> Request:
    return Request(prompt=prompt, max_tokens=count, **options)


def alone(model: Any, prompt: Sequence[int], count: int, **options: Any) -> list[int]:
    return list(generate(model, prompt, max_tokens=count, **options))


@pytest.mark.parametrize("limit", [0, 10**8])
def test_requests_of_all_kinds_are_answered_as_alone(model: Any, limit: int) -> None:
    ways = [
        Sampling(),
        Sampling(temperature=1.1, seed=4),
        Sampling(frequency_penalty=1.5, presence_penalty=0.5),
        Sampling(logit_bias={17: 8.0}, repetition_penalty=1.2),
        Sampling(temperature=0.7, top_k=20, seed=9),
    ]
    requests = [ask(p, 14, sampling=how) for p, how in zip(PROMPTS, ways, strict=True)]
    again = [ask(p, 14, sampling=how) for p, how in zip(PROMPTS, ways, strict=True)]
    wanted = [alone(model, one.prompt, 14, sampling=one.sampling) for one in requests]
    with running(model, prefixes=PrefixCache(limit)) as (scheduler, ear):
        scheduler.submit(requests)
        assert [tokens(events) for events in ear.until_end(requests)] == wanted
        scheduler.submit(again)
        assert [tokens(events) for events in ear.until_end(again)] == wanted
        known = [cached(events) for events in ear.until_end(again)]
    assert known == [len(one.prompt) - 1 if limit else 0 for one in again]


def test_the_next_turn_of_a_conversation_is_known_but_for_what_is_new(model: Any) -> None:
    prompt = list(range(100, 140))
    with running(model) as (scheduler, ear):
        first = ask(prompt, 10)
        scheduler.submit([first])
        reply = tokens(*ear.until_end([first]))
        second = ask([*prompt, *reply, 7, 8], 5)
        scheduler.submit([second])
        (events,) = ear.until_end([second])
    assert cached(events) == len(prompt) + len(reply)
    assert tokens(events) == alone(model, second.prompt, 5)


def test_what_two_requests_begin_with_is_read_once(model: Any) -> None:
    shared = [int(token) for token in np.random.default_rng(0).integers(0, 500, 300)]
    requests = [ask([*shared, end], 4) for end in (1, 2, 3)]
    with running(model) as (scheduler, ear):
        scheduler.submit(requests)
        heard = ear.until_end(requests)
    assert [cached(events) for events in heard] == [0, 300, 300]
    assert [tokens(e) for e in heard] == [alone(model, r.prompt, 4) for r in requests]


def test_no_more_is_remembered_than_there_is_room_for(model: Any) -> None:
    prefixes = PrefixCache(400_000)
    requests = [ask([n, *range(1, 40)], 3) for n in range(12)]
    with running(model, prefixes=prefixes) as (scheduler, ear):
        scheduler.submit(requests)
        ear.until_end(requests)
        assert 0 < prefixes.nbytes <= 400_000
        assert prefixes.nbytes == sum(
            layer.nbytes for _, cache in prefixes._entries.values() for layer in cache
        )
        scheduler.flush()
        last = ask([11, *range(1, 40)], 3)
        scheduler.submit([last])
        assert cached(*ear.until_end([last])) == 0


def test_as_many_texts_are_remembered_as_can_be_compared_with(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minicpm_mlx.engine.batching.prefix_cache.MAX_ENTRIES", 3)
    prefixes = PrefixCache(10**8)
    requests = [ask([n, 7], 2) for n in range(6)]
    with running(model, width=1, prefixes=prefixes) as (scheduler, ear):
        scheduler.submit(requests)
        ear.until_end(requests)
        assert len(prefixes) == 3
        assert [prefixes.match_length(None, [n, 7]) for n in range(6)] == [0, 0, 0, 2, 2, 2]


def test_log_probabilities_are_the_models_own(model: Any) -> None:
    prompt = [1, 300, *range(40, 75)]
    request = ask(
        prompt, 3, top_logprobs=4, logprob_start=0, sampling=Sampling(temperature=1.5, seed=1)
    )
    with running(model) as (scheduler, ear):
        scheduler.submit([request])
        (events,) = ear.until_end([request])
    (read,) = (event for event in events if isinstance(event, PrefillDone))
    said = tokens(events)
    assert said == alone(model, prompt, 3, sampling=request.sampling)
    text = [*prompt, *said]
    logits = model(mx.array([text])).astype(mx.float32)[0]
    wanted = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    scored = [
        *read.prompt_logprobs,
        *(event.token_logprob for event in events if isinstance(event, NewToken)),
    ]
    assert [one.token for one in scored] == text
    assert scored[0].logprob is None
    for place, one in enumerate(scored[1:]):
        assert one.logprob == pytest.approx(wanted[place, one.token], abs=1e-4)
        best = np.argsort(-wanted[place], kind="stable")[:4]
        assert [token for token, _ in one.top] == list(best)
        assert [value for _, value in one.top] == pytest.approx(wanted[place][best], abs=1e-4)


def test_scores_may_begin_anywhere_and_use_what_is_known(model: Any) -> None:
    prompt = list(range(1, 200))
    whole = ask(prompt, 0, logprob_start=0)
    with running(model) as (scheduler, ear):
        scheduler.submit([whole])
        ((all_read,),) = ear.until_end([whole])
        for start in (1, 2, 100, 198):
            part = ask(prompt, 0, logprob_start=start)
            scheduler.submit([part])
            ((read,),) = ear.until_end([part])
            assert isinstance(read, PrefillDone)
            assert isinstance(all_read, PrefillDone)
            assert read.cached_tokens == start - 1
            assert [one.token for one in read.prompt_logprobs] == prompt[start:]
            got = [one.logprob for one in read.prompt_logprobs]
            assert got == pytest.approx(
                [one.logprob for one in all_read.prompt_logprobs[start:]], abs=1e-4
            )


def test_no_end_before_the_fewest_tokens(model: Any) -> None:
    greedy = alone(model, [4], 20)
    eos = frozenset(greedy[:1])
    requests = [ask([4], 20, eos=eos), ask([4], 20, eos=eos, min_tokens=6)]
    with running(model) as (scheduler, ear):
        scheduler.submit(requests)
        short, long = (tokens(events) for events in ear.until_end(requests))
    assert short == greedy[:1]
    assert len(long) >= 6
    assert not set(long[:6]) & eos


def test_more_than_may_wait_are_refused_all_or_none(model: Any) -> None:
    with running(model, width=1, queue=2) as (scheduler, ear):
        first = [ask([1, 2, 3], 200), ask([4], 2)]
        scheduler.submit(first)
        with pytest.raises(QueueFullError, match="already: 2, of at most 3"):
            scheduler.submit([ask([5], 2), ask([6], 2)])
        last = ask([7], 2)
        scheduler.submit([last])
        heard = ear.until_end([*first, last])
    assert [len(tokens(events)) for events in heard] == [200, 2, 2]


def test_a_cancelled_request_is_silent_and_frees_its_place(model: Any) -> None:
    with running(model, width=1) as (scheduler, ear):
        endless, waiting, last = ask([1, 2, 3], 100_000), ask([4], 100_000), ask([5], 3)
        scheduler.submit([endless, waiting, last])
        while not isinstance(ear.next()[1], NewToken):
            pass
        scheduler.cancel([endless, waiting])
        (events,) = ear.until_end([last])
        scheduler.cancel([last])  # it has ended already
        assert tokens(events) == alone(model, [5], 3)
        assert waiting not in ear.heard
        deadline = time.monotonic() + 5
        while scheduler.running_count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (scheduler.running_count, scheduler.waiting_count) == (0, 0)


def test_what_takes_too_long_is_given_up_where_it_is(model: Any) -> None:
    soon = time.monotonic() + 0.2
    late = [ask([1, 2, 3], 100_000, deadline=soon), ask([4], 5, deadline=soon)]
    with running(model, width=1) as (scheduler, ear):
        scheduler.submit(late)
        for events in ear.until_end(late):
            assert isinstance(events[-1], RequestFailed)
            assert isinstance(events[-1].error, TimeoutError)


def test_requests_wait_until_memory_has_room(model: Any) -> None:
    requests = [ask([n], 59) for n in range(1, 6)]
    most = 0
    with running(model, max_positions=130) as (scheduler, ear):
        scheduler.submit(requests)
        while not all(ended(ear.heard.get(one, [])) for one in requests):
            ear.next()
            most = max(most, scheduler.running_count)
        heard = ear.until_end(requests)
    assert most == 2
    assert [tokens(e) for e in heard] == [alone(model, r.prompt, 59) for r in requests]


def test_each_request_is_read_by_its_own_model(model: Any) -> None:
    other: Any = load_model(GOLDEN / "minicpm_1b_like", fuse=True)
    requests = [ask(p, 6, adapter=name) for p in PROMPTS for name in (None, "other")]
    with running(model, models={None: model, "other": other}) as (scheduler, ear):
        scheduler.submit(requests)
        heard = ear.until_end(requests)
    readers = {None: model, "other": other}
    wanted = [alone(readers[one.adapter], one.prompt, 6) for one in requests]
    assert [tokens(events) for events in heard] == wanted


def test_nan_fails_a_request_and_the_next_is_heard() -> None:
    broken: Any = load_model(GOLDEN / "minicpm_2b_like", fuse=True)
    broken.norm.weight = broken.norm.weight * mx.nan
    mx.eval(broken.parameters())  # on this thread, whose stream it is
    sound: Any = load_model(GOLDEN / "minicpm_2b_like", fuse=True)
    requests = [ask([1, 2], 5, adapter="broken"), ask([1, 2], 5)]
    with running(sound, models={None: sound, "broken": broken}) as (scheduler, ear):
        scheduler.submit(requests)
        bad, good = ear.until_end(requests)
    assert isinstance(bad[-1], RequestFailed)
    assert isinstance(bad[-1].error, NumericsError)
    assert tokens(good) == alone(sound, [1, 2], 5)


def test_an_error_of_the_device_fails_its_streams_and_no_later_ones(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(model) as (scheduler, ear):
        request = ask([1, 2], 5)
        step = Batch.step
        monkeypatch.setattr(Batch, "step", lambda _: 1 / 0)
        scheduler.submit([request])
        (events,) = ear.until_end([request])
        assert isinstance(events[-1], RequestFailed)
        monkeypatch.setattr(Batch, "step", step)
        request = ask([1, 2], 5)
        scheduler.submit([request])
        assert tokens(*ear.until_end([request])) == alone(model, [1, 2], 5)


def test_closing_lets_replies_finish_and_takes_no_new_ones(model: Any) -> None:
    with running(model) as (scheduler, ear):
        request = ask([1, 2, 3], 40)
        scheduler.submit([request])
        ear.next()
        scheduler.close(60)
        with pytest.raises(ClosedError):
            scheduler.submit([ask([1], 1)])
        assert len(tokens(*ear.until_end([request]))) == 40
        scheduler.join()


def test_closing_gives_up_what_takes_longer(model: Any) -> None:
    with running(model) as (scheduler, ear):
        request = ask([1, 2, 3], 10**6)
        scheduler.submit([request])
        ear.next()
        scheduler.close(0.1)
        (events,) = ear.until_end([request])
        assert isinstance(events[-1], RequestFailed)
        assert isinstance(events[-1].error, ClosedError)
        scheduler.join()
