"""Continuous batching of many clients' requests, on the one thread that uses the device.

A step applies what has come in (new, canceled and expired requests), admits waiting requests while
there is room, draws a token for every running reply, and reads a chunk of the prompts. Chunks are
small enough that replies do not stutter and that a client that disconnects frees its place at once.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread

import mlx.core as mx

from ...distributed import collectives
from ...errors import MiniCPMError
from ...memory import PREFILL_CHUNK
from ..logprobs import TokenLogprob
from ..session import LanguageModel
from .batch import AdapterBatch, Batch, StreamCache, StreamToken
from .prefill import Prefill
from .prefix_cache import PrefixCache, common_prefix_length
from .requests import NewToken, Request, RequestEvent, RequestFailed, StepPlan

RequestEvents = list[tuple[Request, RequestEvent]]

PREFILL_SECONDS = 0.1
"""Time for prompts in a step while replies are running; it delays their next tokens."""

IDLE_PREFILL_SECONDS = 0.2
"""The same while none is running; it delays the notice that a client has disconnected."""

MIN_CHUNK = 64
"""Smallest chunk of a prompt: half as many tokens take almost as long."""

MIN_SHARED_PREFIX = 64
"""Tokens two prompts must have in common for one to wait for the other's prefill."""


class QueueFullError(MiniCPMError):
    """The queue is full."""


class ClosedError(MiniCPMError):
    """The scheduler takes no more requests."""


class Scheduler:
    """Serves requests and reports their events to `on_events`, on the scheduler's thread.

    `models` are the models by adapter name (None: without one). Up to `width` requests run at once
    and take up to `max_positions` of key-value cache together; up to `queue` more wait. If
    `distributed`, the ranks of a launch, all constructed alike, serve as one: rank 0 takes requests
    and reports, the others follow its plans.
    """

    def __init__(
        self,
        models: Mapping[str | None, LanguageModel],
        on_events: Callable[[RequestEvents], None],
        *,
        vocab_size: int,
        width: int,
        queue: int,
        max_positions: int,
        prefixes: PrefixCache,
        distributed: bool = False,
    ):
        self.on_events, self.width, self.queue = on_events, width, queue
        self.max_positions, self.prefixes = max_positions, prefixes
        self.waiting: deque[Request] = deque()
        self.prefills: list[Prefill] = []
        create = partial(
            Batch,
            vocab_size=vocab_size,
            width=width,
            synchronize=collectives.of_rank_0 if distributed else None,
        )
        self.batches = {
            adapter: AdapterBatch(model, partial(create, model))
            for adapter, model in models.items()
        }
        self.prefill_rate = MIN_CHUNK / PREFILL_SECONDS
        """Prompt tokens a second, as last measured."""
        self.running_count = self.waiting_count = 0
        """For other threads to read."""
        self._distributed = distributed
        self._events: RequestEvents = []
        self._inbox: SimpleQueue[StepPlan] = SimpleQueue()
        self._open, self._lock = 0, Lock()  # requests submitted and not finished
        self._close_at: float | None = None  # set by close()
        self._thread = Thread(target=self.run, name="scheduler", daemon=True)

    # Called by other threads.

    def start(self) -> None:
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue all of `requests`, or none: QueueFullError, or ClosedError."""
        with self._lock:
            if self._close_at is not None:
                raise ClosedError("this server is shutting down")
            if self._open + len(requests) > self.queue + self.width:
                raise QueueFullError(
                    f"requests waiting or running already: {self._open}, of at most "
                    f"{self.queue + self.width}; try again in a moment"
                )
            self._open += len(requests)
        self._inbox.put(StepPlan(submit=list(requests)))

    def cancel(self, requests: Sequence[Request]) -> None:
        """Give requests up, waiting or running; they report no more events."""
        if requests:
            self._inbox.put(StepPlan(cancel=[request.request_id for request in requests]))

    def flush(self) -> None:
        self._inbox.put(StepPlan(flush=True))

    def close(self, seconds: float) -> None:
        """Take no more requests, give those open `seconds` to finish, then end the thread."""
        with self._lock:
            close_at = time.monotonic() + seconds
            self._close_at = close_at if self._close_at is None else min(self._close_at, close_at)
        self._inbox.put(StepPlan())  # wakes the thread

    def join(self) -> None:
        self._thread.join()

    # The scheduler's own thread.

    @property
    def running(self) -> list[Request]:
        replies = [r for batch in self.batches.values() for r in batch.requests.values()]
        return [*(prefill.request for prefill in self.prefills), *replies]

    def run(self) -> None:
        """Serve until closed; `start` runs this on a thread."""
        follows = self._distributed and collectives.rank() > 0
        while True:
            plan = StepPlan() if follows else self._next_plan()
            if self._distributed:
                data = collectives.broadcast(plan.to_bytes())
                plan = StepPlan.from_bytes(data) if follows else plan
            if plan.stop:
                break
            try:
                self.step(plan)
            except Exception as error:  # whatever it is, the clients must learn of it
                self._fail_all(error)
                if follows:
                    raise
        for batch in self.batches.values():
            batch.close()

    def _next_plan(self) -> StepPlan:
        """Collect what has come since the last step; wait while there is nothing to do."""
        plan = StepPlan(prefill_rate=self.prefill_rate)
        while True:
            if self._close_at is not None and not self._open:
                return StepPlan(stop=True)
            has_work = plan.submit or plan.cancel or plan.flush or self.waiting or self.running
            if has_work and self._inbox.empty():
                break
            message = self._inbox.get()
            plan.submit += message.submit
            plan.cancel += message.cancel
            plan.flush |= message.flush
        plan.cancel += self._expire(plan.submit)
        return plan

    def _expire(self, submitted: Sequence[Request]) -> list[int]:
        """Fail the requests that are out of time; return their ids."""
        now = time.monotonic()
        closed = self._close_at is not None and self._close_at <= now
        error: Exception = TimeoutError(
            "not finished in the time that this server gives a request (its --timeout); ask for "
            "fewer tokens"
        )
        if closed:
            error = ClosedError("this server is shutting down")
        expired = [
            request
            for request in (*submitted, *self.waiting, *self.running)
            if closed or (request.deadline or math.inf) <= now
        ]
        for request in expired:
            self._report(request, RequestFailed(error))
        return [request.request_id for request in expired]

    def step(self, plan: StepPlan) -> None:
        """Apply `plan`, admit requests, draw a token of every reply, read a chunk of prompts."""
        self.prefill_rate = plan.prefill_rate or self.prefill_rate
        self.waiting.extend(plan.submit)
        if plan.cancel:
            self._cancel(set(plan.cancel))
        if plan.flush:
            self.prefixes.clear()
        self._admit()
        self.running_count, self.waiting_count = len(self.running), len(self.waiting)
        for batch in self.batches.values():
            self._decode(batch)
            self._send_events()
        self._prefill()
        self._send_events()
        self.running_count = len(self.running)

    # Events.

    def _report(self, request: Request, event: RequestEvent) -> None:
        self._events.append((request, event))

    def _finish(self, request: Request, event: RequestEvent) -> None:
        self._report(request, event)
        self._release(1)

    def _release(self, count: int) -> None:
        with self._lock:
            self._open -= count

    def _send_events(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self.on_events(events)

    def _fail_all(self, error: Exception) -> None:
        for request in [*self.waiting, *self.running]:
            self._finish(request, RequestFailed(error))
        self.waiting.clear()
        self.prefills.clear()
        for batch in self.batches.values():
            batch.close()
        self._send_events()

    def _cancel(self, request_ids: set[int]) -> None:
        before = len(self.waiting) + len(self.running)
        self.waiting = deque(r for r in self.waiting if r.request_id not in request_ids)
        self.prefills = [p for p in self.prefills if p.request.request_id not in request_ids]
        for batch in self.batches.values():
            for request, cache in batch.cancel(request_ids):
                self._cache_prefix(request, cache)
        self._release(before - len(self.waiting) - len(self.running))

    # Admission.

    def _admit(self) -> None:
        """Start waiting requests in their order while there is room.

        A request whose beginning another one is just reading waits for that, and lets others pass.
        """
        postponed: list[Request] = []
        while self.waiting and len(self.running) < self.width:
            request = self.waiting.popleft()
            if not self._fits(request):
                self.waiting.appendleft(request)
                break
            if self._is_being_read(request):
                postponed.append(request)
                continue
            cache = self.prefixes.take(request.adapter, request.prompt[: request.reusable_tokens])
            self.prefills.append(Prefill(self.batches[request.adapter].model, request, cache))
        self.waiting.extendleft(reversed(postponed))

    def _fits(self, request: Request) -> bool:
        """Whether the cache has room; a batch pads each of its streams to the longest."""
        running = [*self.running, request]
        needed = 0
        for adapter in self.batches:
            lengths = [r.max_positions for r in running if r.adapter == adapter]
            needed += len(lengths) * max(lengths, default=0)
        return needed <= self.max_positions or len(running) == 1  # alone, any request may run

    def _is_being_read(self, request: Request) -> bool:
        reusable = request.prompt[: request.reusable_tokens]
        if not self.prefixes.limit or len(reusable) < MIN_SHARED_PREFIX:
            return False
        others = (prefill.request for prefill in self.prefills)
        prompts = [r.prompt for r in others if r.adapter == request.adapter and not r.embed]
        shared = max((common_prefix_length(prompt, reusable) for prompt in prompts), default=0)
        return shared >= self.prefixes.match_length(request.adapter, reusable) + MIN_SHARED_PREFIX

    # Decoding.

    def _decode(self, batch: AdapterBatch) -> None:
        """Draw a token of every reply of a batch."""
        if not batch.requests:
            return
        try:
            tokens = batch.batch.step()
        except Exception as error:  # whatever it is, the other batches continue
            for request in batch.close():
                self._finish(request, RequestFailed(error))
            return
        for token in tokens:
            self._report_token(batch, token)

    def _report_token(self, batch: AdapterBatch, token: StreamToken) -> None:
        request = batch.requests[token.stream]
        try:
            token.raise_error()
        except Exception as error:  # the model's NaN, or a grammar's own
            batch.remove(token.stream)
            self._finish(request, RequestFailed(error))
            return
        event = NewToken(token.token_logprob or TokenLogprob(token.token), token.finish_reason)
        if token.finish_reason is None:
            self._report(request, event)
            return
        self._cache_prefix(request, token.cache)
        del batch.requests[token.stream]
        self._finish(request, event)

    def _cache_prefix(self, request: Request, cache: StreamCache | None) -> None:
        if cache and cache.ids and self.prefixes.limit:
            self.prefixes.insert(request.adapter, cache.ids, cache.cache)

    # Prefill.

    def _prefill(self) -> None:
        """Read a chunk of the prompts, one prompt after the other.

        Read in turn, the first replies begin sooner than if all prompts advanced together.
        """
        replying = any(batch.requests for batch in self.batches.values())
        seconds = PREFILL_SECONDS if replying else IDLE_PREFILL_SECONDS
        budget = max(int(self.prefill_rate * seconds), MIN_CHUNK)
        while self.prefills and budget > 0:
            prefill = self.prefills[0]
            try:
                budget -= self._read_chunk(prefill, min(budget, PREFILL_CHUNK))
            except Exception as error:
                self.prefills.remove(prefill)
                self._finish(prefill.request, RequestFailed(error))
                continue
            if prefill.done:
                self.prefills.remove(prefill)
                self._start_reply(prefill)

    def _read_chunk(self, prefill: Prefill, chunk: int) -> int:
        """Read up to `chunk` tokens; return how many the time would have sufficed for."""
        if prefill.done:  # all of it was cached
            return 0
        start = time.perf_counter()
        count = prefill.advance(chunk)
        if count >= MIN_CHUNK:  # fewer say little about the rate
            self.prefill_rate = count / (time.perf_counter() - start)
        return max(count, MIN_CHUNK)

    def _start_reply(self, prefill: Prefill) -> None:
        mx.clear_cache()  # or it fills with arrays of every prompt's length
        request, result = prefill.request, prefill.result()
        has_new_prefix = prefill.position >= prefill.cached_tokens + MIN_SHARED_PREFIX
        if has_new_prefix and not request.embed:
            tokens = request.prompt[: prefill.position]
            self.prefixes.insert(request.adapter, tokens, prefill.cache)
        if result.final:
            self._finish(request, result)
            return
        self._report(request, result)
        self.batches[request.adapter].add(request, prefill.cache if prefill.position else None)
