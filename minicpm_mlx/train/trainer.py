"""The training loop: steps that can be interrupted, and gone on with as if they had not been."""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .. import device
from ..distributed import collectives
from ..errors import NumericsError
from ..model.transformer import Model
from . import checkpoint
from .checkpoint import Arrays, TrainingProgress, TrainingState
from .data.batches import (
    BatchSampler,
    TrainingBatch,
    length,
    sequences,
)
from .data.samples import Item
from .gradients import batch_losses, full_gradients, layerwise_gradients, set_parameters
from .lora import seed_dropout, without_adapters
from .objectives import Objective
from .optimizer import Optimizer, clip
from .planning import TrainingPlan
from .tracking.events import (
    Listener,
    Noted,
    Saved,
    Started,
    Trained,
    Validated,
)

SKIPS = 3
"""Steps without finite gradients, one after the other, after which a checkpoint is gone back to."""

ROLLBACKS = 2
"""Times that is done in vain before the run ends."""


NOT_FINITE = (
    "training: the last steps had no finite loss or gradients; lower the learning rate "
    "(--learning-rate), or compute in float32 (--dtype float32)"
)


class Trainer:
    """A run of `plan` over `train`, samples of one kind, in the folder of its checkpoints.

    `keep` is called where the model is better than ever on `valid`; without validation, at the end.
    `identity` is what else a run must agree in with the one it resumes.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        plan: TrainingPlan,
        train: Sequence[Item],
        valid: Sequence[Item],
        folder: Path,
        *,
        identity: dict[str, Any] | None = None,
        keep: Callable[[], object] = lambda: None,
        listener: Listener = lambda _: None,
    ):
        self.model, self.objective, self.plan = model, objective, plan
        self.train, self.valid, self.folder = train, valid, folder
        self.fingerprint = plan.fingerprint | (identity or {})
        self.keep, self.listener = keep, listener
        self.order = BatchSampler([length(item) for item in train], plan.samples_a_step, plan.seed)
        self.optimizer = Optimizer(plan.optimizer, plan.weight_decay)
        self.progress = TrainingProgress()
        self.parameters: Arrays = dict(tree_flatten(model.trainable_parameters()))
        self._differentiate = self._loss_and_gradients
        if not device.on_cpu():  # where it takes seconds
            self._differentiate = mx.compile(self._differentiate)
        self._sums: dict[str, float] = {}  # since the last report
        self._norm = 0.0
        self._since, self._tokens_since = time.perf_counter(), 0
        self._saved: TrainingProgress | None = None
        self._stop = self._agreed = False

    def resume(self) -> bool:
        """Take up the latest checkpoint; whether there was one. Errors as `checkpoint.load`."""
        state = checkpoint.load(self.folder, self.fingerprint)
        if state is None:
            return False
        self._take(state)
        return True

    def run(self) -> bool:
        """Do the steps that are left; whether it ended by itself, and was not interrupted.

        NumericsError: gradients stay without end. StorageError: the disk is full.
        """
        plan = self.plan
        self.model.train()
        mx.reset_peak_memory()
        self.listener(Started(step=self.progress.step, steps=plan.steps))
        if self.progress.step:
            self._note(f"going on from step {self.progress.step}")
        with _signals(self._interrupt):
            if self.progress.step == 0:
                self._validate()
            complete = True
            while complete and self.progress.step < plan.steps and not self._hopeless:
                self._step()
                done = self.progress.step
                if done % plan.report_every == 0 or done == plan.steps:
                    self._report()
                complete = not self._ending or done == plan.steps
                if not complete:
                    break
                if done % plan.evaluate_every == 0 or done == plan.steps:
                    self._validate()
                if done % plan.save_every == 0:
                    self._save()
            self._save()
        if self._hopeless:
            self._note(f"no better for {plan.patience} validations: ended early")
        lost = self.progress.rolled_back or self.progress.skipped >= min(SKIPS, plan.steps)
        if complete and lost:  # no sound step since a checkpoint was gone back to, or none at all
            raise NumericsError(NOT_FINITE)
        if not self.progress.best_step:
            if self.valid:
                self._note("no better than before on the validation set: the last step is kept")
            self._keep()
        return complete

    @property
    def _ending(self) -> bool:
        """Whether to end after this step. Processes must agree, or some would wait for others."""
        return self._stop if collectives.size() == 1 else self._agreed

    @property
    def _hopeless(self) -> bool:
        patience = self.plan.patience
        return patience is not None and self.progress.worse >= patience

    # A step

    def _step(self) -> None:
        step, plan = self.progress.step, self.plan
        items = [self.train[place] for place in self.order.at(step)]
        mine = items[collectives.rank() :: collectives.size()]
        total = mx.array(self.objective.weight(items))
        gradients: Arrays = {}
        sums: Arrays = {"stop": mx.array(float(self._stop))}
        for start in range(0, len(mine), plan.batch_size):
            part = mine[start : start + plan.batch_size]
            found, change = self._gradients(part, total, step, start)
            for name, array in change.items():
                gradients[name] = gradients[name] + array if name in gradients else array
            for name, value in found.items():
                sums[name] = sums.get(name, mx.array(0.0)) + value
            mx.eval(gradients, sums)
        if not mine:
            gradients = {name: mx.zeros_like(array) for name, array in self.parameters.items()}
        gradients, sums = collectives.sum_of((gradients, self._alike(sums)))
        clipped, norm = clip(gradients, plan.clip)
        told = {name: float(np.array(value)) for name, value in (sums | {"norm": norm}).items()}
        self._agreed = told.pop("stop") > 0
        texts = sequences(items)
        tokens = sum(len(text.ids) for text in texts)
        self.progress = replace(self.progress, step=step + 1, tokens=self.progress.tokens + tokens)
        self._tokens_since += tokens
        if not (math.isfinite(told["norm"]) and math.isfinite(told["loss"])):
            self._skip()
            return
        rate = plan.schedule.at(step, plan.steps)
        self.parameters |= self.optimizer.step(rate, clipped, self.parameters)
        set_parameters(self.model, self.parameters)
        mx.eval(self.parameters, self.optimizer.state)
        self.progress = replace(self.progress, skipped=0, rolled_back=0)
        self._norm = told.pop("norm")
        for name, amount in (told | {"weight": self.objective.weight(items)}).items():
            self._sums[name] = self._sums.get(name, 0.0) + amount

    def _gradients(
        self, items: Sequence[Item], total: mx.array, step: int, place: int
    ) -> tuple[Arrays, Arrays]:
        # Dropout follows from the step, so that there is no state of it to save.
        draw = random.Random(f"{self.plan.seed} {step} {collectives.rank()} {place}")
        key = mx.random.key(draw.getrandbits(62))
        batch = with_reference(self.model, self.objective, self.objective.batch(items))
        return self._differentiate(self.parameters, batch.arrays, total, key)

    def _loss_and_gradients(
        self, parameters: Arrays, arrays: Arrays, total: mx.array, key: mx.array
    ) -> tuple[Arrays, Arrays]:
        seed_dropout(self.model, key)
        batch, way = (
            TrainingBatch(**arrays),
            layerwise_gradients if self.plan.checkpointing else full_gradients,
        )
        tail = partial(self.objective.sums, batch=batch)
        return way(self.model, parameters, batch, tail, total)

    def _alike(self, sums: Arrays) -> Arrays:
        """With the names that other processes have too, where this one had no samples."""
        names = ("stop", *self.objective.told)
        return {name: sums.get(name, mx.array(0.0)) for name in names}

    def _skip(self) -> None:
        set_parameters(self.model, self.parameters)
        self.progress = replace(self.progress, skipped=self.progress.skipped + 1)
        self._note(f"step {self.progress.step} left out: its loss or gradients are not finite")
        if self.progress.skipped < SKIPS:
            return
        state = checkpoint.load(self.folder, self.fingerprint)
        if state is None or self.progress.rolled_back >= ROLLBACKS:
            raise NumericsError(NOT_FINITE)
        at, back = self.progress, state.progress.step
        self._take(state)
        # The samples that follow are others than those it failed on.
        self.progress = replace(at, skipped=0, rolled_back=at.rolled_back + 1)
        self._note(f"gone back to the weights of step {back}, with the samples that follow")

    # What is done now and then

    def _report(self) -> None:
        now = time.perf_counter()
        sums, weight = self._sums, self._sums.pop("weight", 0.0)
        if not weight:
            return
        loss = sums.pop("loss") / weight
        self.listener(
            Trained(
                step=self.progress.step,
                loss=loss,
                learning_rate=self.plan.schedule.at(self.progress.step - 1, self.plan.steps),
                gradient_norm=self._norm,
                tokens=self.progress.tokens,
                tokens_per_second=self._tokens_since / max(now - self._since, 1e-9),
                epoch=self.progress.step / self.order.per_epoch,
                peak_memory=mx.get_peak_memory(),
                extra={name: value / weight for name, value in sums.items()},
            )
        )
        self._sums, self._since, self._tokens_since = {}, time.perf_counter(), 0

    def _validate(self) -> None:
        if not self.valid:
            return
        begin = time.perf_counter()
        found = evaluate(self.model, self.objective, self.valid, self.plan.batch_size)
        loss = found.pop("loss")
        if not (self.progress.step or math.isfinite(loss)):
            raise NumericsError(
                f"training: the model's validation loss is {loss} before the first step; expected "
                "a number. Are its weights damaged? --dtype float32 may help"
            )
        best = self.progress.best is None or loss < self.progress.best
        if best:
            self.progress = replace(self.progress, best=loss, best_step=self.progress.step, worse=0)
        else:
            self.progress = replace(self.progress, worse=self.progress.worse + 1)
        if best and self.progress.step:
            self._keep()
        self.listener(Validated(step=self.progress.step, loss=loss, best=best, extra=found))
        self._since += time.perf_counter() - begin

    def _keep(self) -> None:
        if collectives.rank() == 0:
            self.keep()

    def _save(self) -> None:
        if collectives.rank() == 0 and self._saved != self.progress:
            state = TrainingState(self.parameters, self.optimizer.state, self.progress)
            place = checkpoint.save(self.folder, state, self.fingerprint)
            self._saved = self.progress
            self.listener(Saved(step=self.progress.step, folder=place))
        collectives.barrier()

    def _take(self, state: TrainingState) -> None:
        shapes = {name: array.shape for name, array in self.parameters.items()}
        if shapes != {name: array.shape for name, array in state.parameters.items()}:
            assert state.folder is not None
            raise checkpoint.damaged(state.folder, "other parameters than this run's")
        # In the order they had, in which their squares are summed for clipping.
        self.parameters = {name: state.parameters[name] for name in self.parameters}
        self.progress = state.progress
        try:
            self.optimizer.state = state.optimizer
        except (KeyError, ValueError) as error:
            raise checkpoint.damaged(state.folder or self.folder, error) from None
        set_parameters(self.model, self.parameters)

    def _note(self, text: str) -> None:
        self.listener(Noted(step=self.progress.step, text=text))

    def _interrupt(self) -> None:
        self._stop = True
        self._note("ending after this step; once more ends at once")


def evaluate(
    model: Model, objective: Objective, items: Sequence[Item], batch_size: int
) -> dict[str, float]:
    """The mean loss over samples, and what else the objective tells of; nothing is changed."""
    model.eval()
    ordered = sorted(items, key=length)
    sums = {name: mx.array(0.0) for name in objective.told}
    parts = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
    for part in parts[collectives.rank() :: collectives.size()]:
        batch = with_reference(model, objective, objective.batch(part))
        found = objective.sums(batch_losses(model, batch), batch)
        sums = {name: sums[name] + found[name] for name in sums}
        mx.eval(sums)
    sums = collectives.sum_of(sums)
    model.train()
    weight = objective.weight(items)
    return {name: float(np.array(value)) / weight for name, value in sums.items()}


def with_reference(model: Model, objective: Objective, batch: TrainingBatch) -> TrainingBatch:
    """The batch with what the model without its adapters makes of it, where that is wanted."""
    if not objective.compares:
        return batch
    with without_adapters(model):
        return replace(batch, reference=-batch.by_text(batch_losses(model, batch)))


@contextmanager
def _signals(interrupt: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and a terminal that closes call `interrupt` once; again they do what they did
    before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in watched}

    def once(*_: object) -> None:
        for number in watched:
            signal.signal(number, before[number])
        interrupt()

    try:
        for number in watched:
            signal.signal(number, once)
        yield
    finally:
        for number in watched:
            signal.signal(number, before[number])
