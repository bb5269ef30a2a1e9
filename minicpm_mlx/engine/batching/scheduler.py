"""Requests of many clients, read and continued together: one thread that alone uses the device.

A turn takes in what has come, gives up what is cancelled or late, lets waiting requests begin where
there is room, and advances all that run: a token of every reply, and a chunk of every prompt that
is being read, small enough that replies do not stutter and a client that leaves frees its place at
once.
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
from ...memory import CHUNK
from ..logprobs import Scored
from ..session import LanguageModel
from .batch import AdapterBatch, Batch, StreamCache
from .prefill import Prefill
from .prefix_cache import PrefixCache, common
from .requests import (
    Event,
    Failed,
    Request,
    StepPlan,
    Token,
)

Told = list[tuple[Request, Event]]

PAUSE = 0.1
"""Seconds that a chunk of a prompt may keep the replies waiting, about."""

SILENCE = 0.2
"""Seconds that it may take while no reply is coming: until a client that has left is noticed."""

SMALLEST = 64
"""Tokens that are worth to be read at once: half as many take almost as long."""

SHARED = 64
"""Tokens that two prompts begin with alike from which on it is worth to read them once."""


class QueueFullError(MiniCPMError):
    """As many requests wait as may."""


class ClosedError(MiniCPMError):
    """The scheduler takes no requests any more."""


class Scheduler:
    """Serves requests; `tell` hears what becomes of them, on the scheduler's thread.

    `models` are those there are, by adapter (None: without one). Up to `width` requests run at
    once, in up to `positions` of cache altogether; up to `queue` more wait. `prefixes` remembers
    what was read. With `together` the ranks of a launch, which have all been given the same, serve
    as one: rank 0 is asked and tells, the others follow.
    """

    def __init__(
        self,
        models: Mapping[str | None, LanguageModel],
        tell: Callable[[Told], None],
        *,
        vocab_size: int,
        width: int,
        queue: int,
        positions: int,
        prefixes: PrefixCache,
        together: bool = False,
    ):
        self.tell, self.width, self.queue, self.positions = tell, width, queue, positions
        self.prefixes = prefixes
        self.waiting: deque[Request] = deque()
        self.readers: list[Prefill] = []
        agree = collectives.of_rank_0 if together else None

        def batch(model: LanguageModel) -> Batch:
            return Batch(model, vocab_size=vocab_size, width=width, agree=agree)

        self.lanes = {
            name: AdapterBatch(model, partial(batch, model)) for name, model in models.items()
        }
        self.rate = SMALLEST / PAUSE
        """Tokens of prompts that are read in a second, about."""
        self.running_count = self.waiting_count = 0
        """Requests that run and wait, for other threads to see."""
        self._together = together
        self._told: Told = []
        self._inbox: SimpleQueue[StepPlan] = SimpleQueue()
        self._open, self._lock = 0, Lock()  # requests that have not ended
        self._late: float | None = None  # when requests are given up, once closed
        self._thread = Thread(target=self.run, name="scheduler", daemon=True)

    # What other threads call.

    def start(self) -> None:
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue all of `requests`, or none: QueueFullError, or ClosedError."""
        with self._lock:
            if self._late is not None:
                raise ClosedError("this server is shutting down")
            if self._open + len(requests) > self.queue + self.width:
                raise QueueFullError(
                    f"requests waiting or running already: {self._open}, of at most "
                    f"{self.queue + self.width}; try again in a moment"
                )
            self._open += len(requests)
        self._inbox.put(StepPlan(submit=list(requests)))

    def cancel(self, requests: Sequence[Request]) -> None:
        """Give requests up, wherever they are; nothing more is told of them."""
        if requests:
            self._inbox.put(StepPlan(cancel=[request.number for request in requests]))

    def flush(self) -> None:
        """Forget what was read before."""
        self._inbox.put(StepPlan(flush=True))

    def close(self, seconds: float) -> None:
        """Take no more requests, let those there are finish for `seconds`, and end."""
        with self._lock:
            late = time.monotonic() + seconds
            self._late = late if self._late is None else min(self._late, late)
        self._inbox.put(StepPlan())

    def join(self) -> None:
        self._thread.join()

    # What the thread does.

    @property
    def running(self) -> list[Request]:
        streams = [one for lane in self.lanes.values() for one in lane.streams.values()]
        return [*(reader.request for reader in self.readers), *streams]

    def run(self) -> None:
        """Serve until closed; `start` has another thread do it."""
        follows = self._together and collectives.rank() > 0
        while True:
            plan = StepPlan() if follows else self._plan()
            if self._together:
                told = collectives.broadcast(plan.to_bytes())
                plan = StepPlan.from_bytes(told) if follows else plan
            if plan.end:
                break
            try:
                self.turn(plan)
            except Exception as error:  # a client must hear of it, whatever it is
                self._fail(error)
                if follows:
                    raise
        for lane in self.lanes.values():
            lane.close()

    def _plan(self) -> StepPlan:
        """What has come since the last turn; waits while there is nothing to do."""
        plan = StepPlan(rate=self.rate)
        while True:
            if self._late is not None and not self._open:
                return StepPlan(end=True)
            new = plan.submit or plan.cancel or plan.flush
            if (new or self.waiting or self.running) and self._inbox.empty():
                break
            found = self._inbox.get()
            plan.submit += found.submit
            plan.cancel += found.cancel
            plan.flush |= found.flush
        plan.cancel += self._expired(plan.submit)
        return plan

    def _expired(self, coming: Sequence[Request]) -> list[int]:
        """Requests whose time is over, which they are told."""
        now, everyone = time.monotonic(), [*coming, *self.waiting, *self.running]
        closed = self._late is not None and self._late <= now
        over = [one for one in everyone if closed or (one.deadline or math.inf) <= now]
        error: Exception = TimeoutError(
            "not finished in the time that this server gives a request (its --timeout); ask for "
            "fewer tokens"
        )
        if closed:
            error = ClosedError("this server is shutting down")
        for request in over:
            self._say(request, Failed(error))
        return [request.number for request in over]

    def turn(self, plan: StepPlan) -> None:
        """One round over all there is to do."""
        self.rate = plan.rate or self.rate
        self.waiting.extend(plan.submit)
        if plan.cancel:
            self._cancel(set(plan.cancel))
        if plan.flush:
            self.prefixes.clear()
        self._admit()
        self.running_count, self.waiting_count = len(self.running), len(self.waiting)
        for lane in self.lanes.values():
            self._advance(lane)
            self._flush()
        self._read()
        self._flush()
        self.running_count = len(self.running)

    def _say(self, request: Request, event: Event) -> None:
        self._told.append((request, event))

    def _end(self, request: Request, event: Event) -> None:
        self._say(request, event)
        self._ended(1)

    def _ended(self, count: int) -> None:
        with self._lock:
            self._open -= count

    def _fail(self, error: Exception) -> None:
        """Give up everything."""
        for request in [*self.waiting, *self.running]:
            self._end(request, Failed(error))
        self.waiting.clear()
        self.readers.clear()
        for lane in self.lanes.values():
            lane.close()
        self._flush()

    def _flush(self) -> None:
        if self._told:
            told, self._told = self._told, []
            self.tell(told)

    def _cancel(self, numbers: set[int]) -> None:
        before = len(self.waiting) + len(self.running)
        self.waiting = deque(one for one in self.waiting if one.number not in numbers)
        self.readers = [one for one in self.readers if one.request.number not in numbers]
        for lane in self.lanes.values():
            for request, kept in lane.cancel(numbers):
                self._keep(request, kept)
        self._ended(before - len(self.waiting) - len(self.running))

    # Beginning.

    def _admit(self) -> None:
        """Let requests begin in the order they came; one whose beginning is being read for another
        waits for that."""
        held: list[Request] = []
        while self.waiting and len(self.running) < self.width:
            request = self.waiting.popleft()
            if not self._fits(request):
                self.waiting.appendleft(request)
                break
            if self._is_being_read(request):
                held.append(request)
                continue
            self._begin(request)
        self.waiting.extendleft(reversed(held))

    def _fits(self, request: Request) -> bool:
        """Whether there is room for it: in a lane each stream takes as much as the longest."""
        needed = 0
        for name, lane in self.lanes.items():
            sizes = [one.size for one in lane.streams.values()]
            sizes += [one.request.size for one in self.readers if one.request.adapter == name]
            sizes += [request.size] if request.adapter == name else []
            needed += len(sizes) * max(sizes, default=0)
        return needed <= self.positions or not self.running

    def _is_being_read(self, request: Request) -> bool:
        reusable = request.prompt[: request.reusable]
        if not self.prefixes.limit or len(reusable) < SHARED:
            return False
        alike = (one.request for one in self.readers if one.request.adapter == request.adapter)
        coming = max((common(one.prompt, reusable) for one in alike if not one.pooled), default=0)
        return coming >= self.prefixes.common(request.adapter, reusable) + SHARED

    def _begin(self, request: Request) -> None:
        cache = self.prefixes.take(request.adapter, request.prompt[: request.reusable])
        self.readers.append(Prefill(self.lanes[request.adapter].model, request, cache))

    # Running.

    def _advance(self, lane: AdapterBatch) -> None:
        """A token of every reply of a lane."""
        if not lane.streams:
            return
        try:
            drawn = lane.step()
        except Exception as error:  # whatever it is, the other lanes go on
            for request in lane.reset():
                self._end(request, Failed(error))
            return
        for one in drawn:
            request = lane.streams[one.stream]
            try:
                one.check()
            except Exception as error:  # of the model, or of a grammar
                lane.remove(one.stream)
                self._end(request, Failed(error))
                continue
            token = Token(one.scored or Scored(one.token), one.reason)
            if one.reason is None:
                self._say(request, token)
                continue
            self._keep(request, one.kept)
            del lane.streams[one.stream]
            self._end(request, token)

    def _read(self) -> None:
        """A chunk of prompts, in their order: the first token of each comes sooner so than if all
        were read a little at a time."""
        speaks = any(lane.streams for lane in self.lanes.values())
        chunk = max(int(self.rate * (PAUSE if speaks else SILENCE)), SMALLEST)
        while self.readers and chunk > 0:
            reader = self.readers[0]
            try:
                chunk -= self._read_part(reader, min(chunk, CHUNK))
            except Exception as error:
                self.readers.remove(reader)
                self._end(reader.request, Failed(error))
                continue
            if reader.done:
                self.readers.remove(reader)
                self._has_read(reader)

    def _read_part(self, reader: Prefill, chunk: int) -> int:
        """Read up to `chunk` tokens; how many could have been in that time."""
        if reader.done:
            return 0
        start = time.perf_counter()
        count = reader.advance(chunk)
        if count >= SMALLEST:
            self.rate = count / (time.perf_counter() - start)
        return max(count, SMALLEST)

    def _has_read(self, reader: Prefill) -> None:
        mx.clear_cache()  # arrays of every length would pile up in it
        request, result = reader.request, reader.result
        if reader.at >= reader.cached + SHARED and not request.pooled:
            self.prefixes.keep(request.adapter, request.prompt[: reader.at], reader.cache)
        if result.last:
            self._end(request, result)
            return
        self._say(request, result)
        self.lanes[request.adapter].add(request, reader.cache if reader.at else None)

    def _keep(self, request: Request, kept: StreamCache | None) -> None:
        if kept and kept.ids and self.prefixes.limit:
            self.prefixes.keep(request.adapter, kept.ids, kept.cache)
