"""Measures the settings that could make a model faster on this machine.

Each setting is tried against the best so far, in processes of their own that take turns, since most
of them only act when MLX starts or a model is loaded. A setting that is not clearly faster is not
kept, so the result is never slower than the defaults.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from .. import device
from ..loading.tuning import DRAFT_COSTS, Tuning
from .comparison import LOOKS, Verdict, duel
from .contender import Contender, ContenderError

BUDGET = 180.0
"""Seconds of `bench --tune`."""
UNASKED = 20.0
"""Seconds after a model was made, when nobody asked."""
SAMPLE = 0.06
"""Seconds of decoding that are timed at once, at least."""
ROWS = (1, 2, 3, 5, 9, 17)
"""Tokens of a pass whose cost is measured, for drafts of one fewer."""
NO_TIME = "no time left"
COPIES = 2.2
"""Times a model's memory, for two of them side by side."""


class Contestant(Protocol):
    """As `Contender`."""

    facts: dict[str, Any]

    def measure(self, work: str, number: int, seconds: float = 60) -> Any: ...
    def close(self) -> None: ...


Start = Callable[[Tuning, float], Contestant]
"""Starts a process with settings, within so many seconds; ContenderError."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting that was tried."""

    name: str
    verdict: Verdict | None = None
    problem: str | None = None
    """Why there is no verdict."""

    @property
    def kept(self) -> bool:
        return self.verdict is not None and self.verdict.faster

    def row(self) -> dict[str, Any]:
        speeds: dict[str, Any] = dict.fromkeys(("speed", "least", "most", "rounds"))
        if (found := self.verdict) is not None:
            limits = (1 / found.ratio, 1 / found.high, 1 / found.low)
            speeds = dict(zip(speeds, (round(n, 4) for n in limits), strict=False))
            speeds["rounds"] = found.rounds
        return {"setting": self.name, **speeds, "kept": self.kept, "problem": self.problem}


def candidates(facts: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and settings of what to try for decoding, by what a loaded model says of itself."""
    for wide in reversed(facts["wide"]):
        yield f"zero columns ({wide})", {"wide": wide}
    for limits in buffer_candidates():
        name = f"{limits[0]} kernels or {limits[1]} MB" if any(limits) else "as MLX has them"
        yield f"command buffers: {name}", {"buffers": limits}
    if facts["own_kernels"]:
        yield "own kernels off", {"own_kernels": False}
    for size in facts["groups"]:
        yield f"groups of {size}", {"group_size": size}


def buffer_candidates() -> list[tuple[int, int]]:
    """Limits of command buffers other than this Mac's default; none where the user set them."""
    if device.command_buffers is None or device.buffers_given:
        return []
    chip, memory = device.mac_chip(), device.total_memory()
    most = min(device.MAX_MB, memory // device.MEMORY_SHARE // 2**20)
    default = device.buffer_limits(chip, memory) or (0, 0)
    limits = [(0, 0), (device.MAX_OPS, most), (device.MAX_OPS // 5, most // 2)]
    return [pair for pair in limits if pair != default]


class Tuner:
    """Tries candidates one after the other, within a budget of seconds."""

    def __init__(
        self,
        start: Start,
        budget: float,
        show: Callable[[str], object] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.start, self.show, self.clock = start, show, clock
        self.deadline = clock() + budget
        self.best = Tuning()
        self.trials: list[Trial] = []

    @property
    def left(self) -> float:
        return self.deadline - self.clock()

    def run(self) -> Tuning:
        """Return the fastest settings; `trials` says how they were found. ContenderError where the
        model cannot be run as it is."""
        self.show("loading the model")
        self.holder = self.start(self.best, self.left)
        try:
            facts = self.holder.facts
            self.steps = self._calibrate()
            for name, change in candidates(facts):
                self._try(name, replace(self.best, **change), facts)
            self._try_chunks(facts)
            self._measure_drafts()
            return self.best
        finally:
            self.holder.close()

    def _calibrate(self) -> int:
        """Decode steps of a sample."""
        seconds = min(self._timed("decode", 4) for _ in range(2)) / 4
        return min(max(math.ceil(SAMPLE / max(seconds, 1e-6)), 2), 64)

    def _try(self, name: str, tuning: Tuning, facts: dict[str, Any]) -> None:
        self.show(name)
        if facts["bytes"] * COPIES > device.total_memory() * 3 / 4:
            self._note(name, problem="two copies of the model do not fit in memory")
            return
        if self.left <= 0:
            self._note(name, problem=NO_TIME)
            return
        try:
            verdict = self._against(tuning)
            if verdict is not None and verdict.faster:
                # Processes alike in all can differ: where their memory lies, what runs beside them.
                self.holder.close()
                self.holder = self.start(self.best, self.left)
                verdict = self._against(tuning, may_stay=True)
        except ContenderError as error:
            self._note(name, problem=str(error))
            return
        self._note(name, verdict)

    def _against(self, tuning: Tuning, *, may_stay: bool = False) -> Verdict | None:
        """Compare settings in a new process with the best; with `may_stay` they replace it if they
        are faster."""
        rival = self.start(tuning, self.left)
        try:
            for contestant in (rival, self.holder):  # compiles kernels, fills caches
                self._timed("decode", self.steps, contestant)
            verdict = self._duel(
                lambda: self._timed("decode", self.steps),
                lambda: self._timed("decode", self.steps, rival),
            )
            if may_stay and verdict is not None and verdict.faster:
                self.best, self.holder, rival = tuning, rival, self.holder
            return verdict
        finally:
            rival.close()

    def _try_chunks(self, facts: dict[str, Any]) -> None:
        """Shorter chunks of a prompt than memory allows."""
        default = facts["chunk"]
        for chunk in (default // 2, default // 4):
            name = f"prompts in chunks of {chunk}"
            if chunk < 128 or facts["longest"] <= default or self.best.prefill_chunk:
                continue
            self.show(name)
            times = {}
            try:
                for size in (default, chunk, default):  # the first one compiles kernels
                    times[size] = self._timed("prefill", size)
                if 2 * LOOKS[0] * max(times.values()) > self.left:
                    self._note(name, problem=NO_TIME)
                    continue
                pair = [partial(self._timed, "prefill", size) for size in (default, chunk)]
                verdict = self._duel(*pair)
                if verdict is not None and verdict.faster:
                    verdict = self._duel(*pair)  # as for other settings
            except ContenderError as error:
                self._note(name, problem=str(error))
                return
            self._note(name, verdict)
            if verdict is not None and verdict.faster:
                self.best = replace(self.best, prefill_chunk=chunk)

    def _measure_drafts(self) -> None:
        """How much longer a pass takes with draft tokens to verify."""
        self.show("passes of several tokens")
        seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
        try:
            for number in range(6):
                for rows in ROWS:
                    value = self._timed("rows", rows)
                    if number:  # the first one compiles kernels
                        seconds[rows].append(value)
        except ContenderError:
            return
        costs = draft_costs({rows: statistics.median(values) for rows, values in seconds.items()})
        self.best = replace(self.best, draft_costs=costs)

    def _timed(self, work: str, number: int, contestant: Contestant | None = None) -> float:
        if self.left <= 0:
            raise ContenderError(NO_TIME)
        return float((contestant or self.holder).measure(work, number, self.left))

    def _duel(self, best: Callable[[], float], rival: Callable[[], float]) -> Verdict | None:
        return duel(best, rival, goes_on=lambda: self.left > 0)

    def _note(self, name: str, verdict: Verdict | None = None, problem: str | None = None) -> None:
        if verdict is None and (problem is None or self.left <= 0):
            problem = NO_TIME
        self.trials.append(Trial(name=name, verdict=verdict, problem=problem))


def draft_costs(seconds: dict[int, float]) -> tuple[float, ...]:
    """The cost of 1 to DRAFT_COSTS draft tokens, as shares of a pass of one token, from the seconds
    of passes of some numbers of tokens; it never falls."""
    costs, least = [], 0.005
    known = sorted(seconds)
    for rows in range(2, DRAFT_COSTS + 2):
        after = next(n for n in known if n >= rows)
        before = max(n for n in known if n < rows)
        share = (rows - before) / (after - before)
        value = seconds[before] + share * (seconds[after] - seconds[before])
        least = max(least, value / seconds[known[0]] - 1)
        costs.append(round(least, 4))
    return tuple(costs)


def tune_model(
    model: str, budget: float, show: Callable[[str], object] = lambda text: None
) -> tuple[Tuning, list[Trial]]:
    """Tune a model by name, folder or shape; nothing is kept yet.

    ContenderError where it cannot be run as it is.
    """
    tuner = Tuner(process_starter(model), budget, show)
    return tuner.run(), tuner.trials


def process_starter(model: str) -> Start:
    """Starts contenders of a model, by name, folder or shape."""
    return lambda tuning, seconds: Contender(model, tuning, max(seconds, 1))
