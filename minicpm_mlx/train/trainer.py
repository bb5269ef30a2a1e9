"""The training loop. It can be interrupted at any step, and resumes exactly."""

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

from ..distributed import collectives
from ..errors import NumericsError
from ..model.transformer import Model
from . import checkpoint, cpu_kernels
from .checkpoint import Arrays, TrainingProgress, TrainingState
from .data.batches import BatchSampler, TrainingBatch, length, sequences
from .data.samples import Item
from .gradients import batch_losses, full_gradients, layerwise_gradients, set_parameters
from .lora import seed_dropout, without_adapters
from .objectives import Objective
from .optimizer import Optimizer, clip
from .planning import TrainingPlan
from .tracking.events import Listener, Noted, Saved, Started, Trained, Validated
from .validation import SHARE, representative

SKIPS = 3
"""Consecutive steps without finite gradients before a rollback to a checkpoint."""

ROLLBACKS = 2
"""Consecutive rollbacks before the run fails."""

SLOW_DISK = 1e8
"""Bytes written in a second, until a checkpoint tells."""

NOT_FINITE = (
    "training: the last steps had no finite loss or gradients; lower the learning rate "
    "(--learning-rate), or compute in float32 (--dtype float32)"
)


class Trainer:
    """Trains `model` on `train`, items of one type, and saves checkpoints in `folder`.

    `keep` is called when the loss on `valid` reaches a new low; without validation, at the end.
    `identity` holds further settings that a resumed run must share.
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
        self.train, self.folder = train, folder
        self.valid = representative(valid, plan.validation_samples)
        self.fingerprint = plan.fingerprint | (identity or {})
        self.keep, self.listener = keep, listener
        lengths = [length(item) for item in train]
        self.sampler = BatchSampler(lengths, plan.samples_a_step, plan.seed)
        self.optimizer = Optimizer(plan.optimizer, plan.weight_decay)
        self.progress = TrainingProgress()
        self.parameters: Arrays = dict(tree_flatten(model.trainable_parameters()))
        self._sums_and_gradients = cpu_kernels.compiled(self._compute_gradients)
        self._metric_sums: dict[str, float] = {}  # since the last report
        self._gradient_norm = 0.0
        self._report_time, self._report_tokens = time.perf_counter(), 0
        self._saved: TrainingProgress | None = None
        self._started, self._saving, self._longest_save = time.perf_counter(), 0.0, 0.0  # seconds
        self._stop = False  # in this process
        self._any_stop = False  # in any process, as of the last step

    def resume(self) -> bool:
        """Loads the latest checkpoint; False if there is none. Errors as `checkpoint.load`."""
        state = checkpoint.load(self.folder, self.fingerprint)
        if state is not None:
            self._restore(state)
        return state is not None

    def run(self) -> bool:
        """Runs the remaining steps; False if it was interrupted.

        NumericsError: gradients stay infinite or NaN. StorageError: the disk is full.
        """
        self.model.train()
        mx.reset_peak_memory()
        self._started = time.perf_counter()
        self.listener(Started(step=self.progress.step, steps=self.plan.steps))
        if self.progress.step:
            self._note(f"resuming from step {self.progress.step}")
        with _signals(self._interrupt):
            if self.progress.step == 0:
                self._validate()
            complete = self._run_steps()
            self._save()
        if self._is_out_of_patience:
            self._note(f"no better for {self.plan.patience} validations: ended early")
        skipped_all = self.progress.skipped >= min(SKIPS, self.plan.steps)
        if complete and (self.progress.rolled_back or skipped_all):  # no successful step since
            raise NumericsError(NOT_FINITE)
        if not self.progress.best_step:
            if self.progress.is_validated:
                self._note("the validation loss never improved: keeping the last step")
            self._keep()
        return complete

    def _run_steps(self) -> bool:
        plan = self.plan
        while self.progress.step < plan.steps and not self._is_out_of_patience:
            self._step()
            done, is_last = self.progress.step, self.progress.step == plan.steps
            if done % plan.report_every == 0 or is_last:
                self._report()
            # All processes must end after the same step, or some would wait for others forever.
            stop = self._stop if collectives.size() == 1 else self._any_stop
            if stop and not is_last:
                return False
            if done % plan.evaluate_every == 0 or is_last:
                self._validate()
            if done % (plan.save_every or -(-plan.steps // 10)) == 0:
                self._save(at_any_cost=plan.save_every is not None)
        return True

    @property
    def _is_out_of_patience(self) -> bool:
        patience = self.plan.patience
        return patience is not None and self.progress.worse >= patience

    # Steps

    def _step(self) -> None:
        step, plan = self.progress.step, self.plan
        items = [self.train[index] for index in self.sampler.at(step)]
        gradients, sums = self._accumulate(items, step)
        clipped, norm = clip(gradients, plan.clip)
        values = {name: float(np.array(value)) for name, value in (sums | {"norm": norm}).items()}
        self._any_stop = values.pop("stop") > 0
        tokens = sum(len(text.ids) for text in sequences(items))
        self.progress = replace(self.progress, step=step + 1, tokens=self.progress.tokens + tokens)
        self._report_tokens += tokens
        if not (math.isfinite(values["norm"]) and math.isfinite(values["loss"])):
            self._skip()
            return
        rate = plan.schedule.at(step, plan.steps)
        self.parameters |= self.optimizer.step(rate, clipped, self.parameters)
        set_parameters(self.model, self.parameters)
        mx.eval(self.parameters, self.optimizer.state)
        self.progress = replace(self.progress, skipped=0, rolled_back=0)
        self._gradient_norm = values.pop("norm")
        for name, value in (values | {"weight": self.objective.weight(items)}).items():
            self._metric_sums[name] = self._metric_sums.get(name, 0.0) + value

    def _accumulate(self, items: Sequence[Item], step: int) -> tuple[Arrays, Arrays]:
        """Sums gradients and metrics over the batches of a step, and over processes."""
        own = items[collectives.rank() :: collectives.size()]
        total = mx.array(self.objective.weight(items))
        gradients: Arrays = {}
        sums: Arrays = {"stop": mx.array(float(self._stop))}
        for start in range(0, len(own), self.plan.batch_size):
            batch_items = own[start : start + self.plan.batch_size]
            # Dropout depends on the step alone, so it has no state to save.
            rng = random.Random(f"{self.plan.seed} {step} {collectives.rank()} {start}")
            key = mx.random.key(rng.getrandbits(62))
            batch = add_reference(self.model, self.objective, self.objective.batch(batch_items))
            batch_sums, change = self._sums_and_gradients(self.parameters, batch.arrays, total, key)
            for name, array in change.items():
                gradients[name] = gradients[name] + array if name in gradients else array
            for name, value in batch_sums.items():
                sums[name] = sums.get(name, mx.array(0.0)) + value
            mx.eval(gradients, sums)
        if not own:  # fewer samples than processes
            gradients = {name: mx.zeros_like(array) for name, array in self.parameters.items()}
        # All processes must add the same names, also one without samples.
        names = ("stop", *self.objective.metrics)
        sums = {name: sums.get(name, mx.array(0.0)) for name in names}
        total_gradients, total_sums = collectives.sum_of((gradients, sums))
        return total_gradients, total_sums

    def _compute_gradients(
        self, parameters: Arrays, arrays: Arrays, total: mx.array, key: mx.array
    ) -> tuple[Arrays, Arrays]:
        seed_dropout(self.model, key)
        batch = TrainingBatch(**arrays)
        compute = layerwise_gradients if self.plan.checkpointing else full_gradients
        reduction = partial(self.objective.sums, batch=batch)
        return compute(self.model, parameters, batch, reduction, total)

    def _skip(self) -> None:
        """Skips a step whose gradients are not finite; after several, rolls back."""
        set_parameters(self.model, self.parameters)
        self.progress = replace(self.progress, skipped=self.progress.skipped + 1)
        self._note(f"step {self.progress.step} skipped: its loss or gradients are not finite")
        if self.progress.skipped < SKIPS:
            return
        state = checkpoint.load(self.folder, self.fingerprint)
        if state is None or self.progress.rolled_back >= ROLLBACKS:
            raise NumericsError(NOT_FINITE)
        progress = self.progress
        self._restore(state)
        # Only weights are rolled back: the next samples differ from those that failed.
        self.progress = replace(progress, skipped=0, rolled_back=progress.rolled_back + 1)
        self._note(f"rolled back to the weights of step {state.progress.step}")

    # Between steps

    def _report(self) -> None:
        now = time.perf_counter()
        sums, weight = self._metric_sums, self._metric_sums.pop("weight", 0.0)
        if not weight:
            return
        loss = sums.pop("loss") / weight
        self.listener(
            Trained(
                step=self.progress.step,
                loss=loss,
                learning_rate=self.plan.schedule.at(self.progress.step - 1, self.plan.steps),
                gradient_norm=self._gradient_norm,
                tokens=self.progress.tokens,
                tokens_per_second=self._report_tokens / max(now - self._report_time, 1e-9),
                epoch=self.progress.step / self.sampler.per_epoch,
                peak_memory=mx.get_peak_memory(),
                extra={name: value / weight for name, value in sums.items()},
            )
        )
        self._metric_sums = {}
        self._report_time, self._report_tokens = time.perf_counter(), 0

    def _validate(self) -> None:
        if not self.valid:
            return
        start, step = time.perf_counter(), self.progress.step
        metrics = evaluate(self.model, self.objective, self.valid, self.plan.batch_size)
        loss = metrics.pop("loss")
        if not (step or math.isfinite(loss)):
            raise NumericsError(
                f"training: the model's validation loss is {loss} before the first step; expected "
                "a number. Are its weights damaged? --dtype float32 may help"
            )
        is_best = self.progress.best is None or loss < self.progress.best
        if is_best:
            self.progress = replace(self.progress, best=loss, best_step=step, worse=0)
        else:
            self.progress = replace(self.progress, worse=self.progress.worse + 1)
        if is_best and step:
            self._keep()
        self.listener(Validated(step=step, loss=loss, best=is_best, extra=metrics))
        self._report_time += time.perf_counter() - start

    def _keep(self) -> None:
        if collectives.rank() == 0:
            self.keep()

    def _save(self, *, at_any_cost: bool = True) -> None:
        if collectives.rank() == 0 and self._saved != self.progress:
            start = time.perf_counter()
            state = TrainingState(self.parameters, self.optimizer.state, self.progress)
            if at_any_cost or self._is_saving_cheap(state, start):
                path = checkpoint.save(self.folder, state, self.fingerprint)
                self._saved = self.progress
                seconds = time.perf_counter() - start
                self._saving += seconds
                self._longest_save = max(self._longest_save, seconds)
                self._report_time += seconds
                self.listener(Saved(step=self.progress.step, folder=path))
        collectives.barrier()

    def _is_saving_cheap(self, state: TrainingState, now: float) -> bool:
        """Whether one more checkpoint, and that of the end, take at most SHARE of the time so far.

        Steps and their results do not depend on it, so that it may be measured.
        """
        arrays = [*state.parameters.values(), *state.optimizer.values()]
        size = sum(array.nbytes for array in arrays)
        once = self._longest_save or size / SLOW_DISK
        return self._saving + 2 * once <= SHARE * (now - self._started)

    def _restore(self, state: TrainingState) -> None:
        path = state.folder or self.folder
        shapes = {name: array.shape for name, array in self.parameters.items()}
        if shapes != {name: array.shape for name, array in state.parameters.items()}:
            raise checkpoint.damaged(path, "other parameters than this run's")
        # In the original order, in which clipping sums squares: a resumed run must round alike.
        self.parameters = {name: state.parameters[name] for name in self.parameters}
        self.progress = state.progress
        try:
            self.optimizer.state = state.optimizer
        except (KeyError, ValueError) as error:
            raise checkpoint.damaged(path, error) from None
        set_parameters(self.model, self.parameters)

    def _note(self, text: str) -> None:
        self.listener(Noted(step=self.progress.step, text=text))

    def _interrupt(self) -> None:
        self._stop = True
        self._note("stopping after this step; interrupt again to stop at once")


def evaluate(
    model: Model, objective: Objective, items: Sequence[Item], batch_size: int
) -> dict[str, float]:
    """Returns the mean loss over `items`, and the objective's other metrics."""
    model.eval()
    by_length = sorted(items, key=length)
    sums = {name: mx.array(0.0) for name in objective.metrics}
    batches = [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]
    for batch_items in batches[collectives.rank() :: collectives.size()]:
        batch = add_reference(model, objective, objective.batch(batch_items))
        batch_sums = objective.sums(batch_losses(model, batch), batch)
        sums = {name: sums[name] + batch_sums[name] for name in sums}
        mx.eval(sums)
    sums = collectives.sum_of(sums)
    model.train()
    weight = objective.weight(items)
    return {name: float(np.array(value)) / weight for name, value in sums.items()}


def add_reference(model: Model, objective: Objective, batch: TrainingBatch) -> TrainingBatch:
    """Adds the log probabilities of the reference model, if the objective needs them."""
    if not objective.needs_reference:
        return batch
    with without_adapters(model):
        return replace(batch, reference=-batch.by_text(batch_losses(model, batch)))


@contextmanager
def _signals(interrupt: Callable[[], None]) -> Iterator[None]:
    """Calls `interrupt` on the first Ctrl-C, SIGTERM or SIGHUP; later ones act as before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def handle(*_: object) -> None:
        restore()
        interrupt()

    try:
        for number in handlers:
            signal.signal(number, handle)
        yield
    finally:
        restore()
