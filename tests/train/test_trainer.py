"""The training loop: sampling, interruption at any step, and failures."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import which
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_mlx import device
from minicpm_mlx.errors import InvalidArgumentError, NumericsError, StorageError
from minicpm_mlx.train import checkpoint, lora
from minicpm_mlx.train.data.batches import BatchSampler
from minicpm_mlx.train.data.samples import Sample
from minicpm_mlx.train.lora import LoRAConfig
from minicpm_mlx.train.objectives import CrossEntropy
from minicpm_mlx.train.optimizer import OPTIMIZERS, SCHEDULES, Optimizer, Schedule, clip
from minicpm_mlx.train.planning import TrainingPlan
from minicpm_mlx.train.tracking.events import Event, Noted, Saved, Trained, Validated
from minicpm_mlx.train.trainer import Trainer
from support.random_models import random_model

RANDOM = np.random.default_rng(0)
PLAN = TrainingPlan(
    steps=12,
    batch_size=2,
    accumulate=2,
    schedule=Schedule(peak=1e-2, warmup=2),
    report_every=3,
    evaluate_every=4,
    save_every=3,
)
METHOD = LoRAConfig(rank=4, dropout=0.1)


def sample(low: int = 8, high: int = 40) -> Sample:
    """A text of few words, so that there is something to learn."""
    ids: list[int] = RANDOM.integers(0, 20, int(RANDOM.integers(low, high))).tolist()
    return Sample(ids, [place >= 3 for place in range(len(ids))])


TRAIN, VALID = [sample() for _ in range(21)], [sample() for _ in range(5)]


def trainer(
    folder: Path,
    plan: TrainingPlan = PLAN,
    method: LoRAConfig = METHOD,
    events: list[Event] | None = None,
    **rest: Any,
) -> Trainer:
    model = random_model()
    mx.random.seed(plan.seed)
    lora.prepare_model(model, method)
    listener = (lambda _: None) if events is None else events.append
    arguments = {"train": TRAIN, "valid": VALID} | rest
    return Trainer(model, CrossEntropy(), plan, folder=folder, listener=listener, **arguments)


def run(trainer: Trainer) -> Trainer:
    assert trainer.run()
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A completed run; read-only."""
    return run(trainer(tmp_path_factory.mktemp("whole")))


def alike(a: Trainer, b: Trainer) -> bool:
    """To the last bit."""
    assert a.parameters.keys() == b.parameters.keys()
    return all(mx.array_equal(a.parameters[name], b.parameters[name]) for name in a.parameters)


def close(a: Trainer, b: Trainer, tolerance: float) -> bool:
    differences = (mx.abs(a.parameters[name] - b.parameters[name]).max() for name in a.parameters)
    return all(difference.item() < tolerance for difference in differences)


def notes(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Noted)]


# BatchSampler


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=300),
    size=st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_an_epoch_reads_every_sample_once(lengths: list[int], size: int, seed: int) -> None:
    order = BatchSampler(lengths, size, seed)
    for epoch in range(2):
        batches = [order.at(epoch * order.per_epoch + step) for step in range(order.per_epoch)]
        seen = Counter(place for batch in batches for place in batch)
        assert seen == Counter(range(len(lengths)))
        assert sorted(map(len, batches))[1:] == [size] * (len(batches) - 1)


def test_epochs_differ_and_seeds_differ_and_lengths_are_alike_in_a_batch() -> None:
    lengths = RANDOM.integers(1, 500, 400).tolist()
    order, other = BatchSampler(lengths, 4, 0), BatchSampler(lengths, 4, 1)
    batches = [order.at(step) for step in range(200)]
    assert batches[:100] != batches[100:]
    assert batches != [other.at(step) for step in range(200)]
    spread = [max(s) - min(s) for batch in batches if (s := [lengths[n] for n in batch])]
    assert np.median(spread) < 20
    assert BatchSampler(lengths, 4, 0).at(150) == order.at(150)


# Steps


def test_it_learns_and_says_so(tmp_path: Path) -> None:
    events: list[Event] = []
    kept: list[int] = []
    trained = trainer(tmp_path, events=events)
    trained.keep = lambda: kept.append(trained.progress.step)
    run(trained)
    validations = [event for event in events if isinstance(event, Validated)]
    assert [event.step for event in validations] == [0, 4, 8, 12]
    assert validations[-1].loss < validations[0].loss - 0.3
    assert kept == [event.step for event in validations[1:] if event.best]
    reports = [event for event in events if isinstance(event, Trained)]
    assert [event.step for event in reports] == [3, 6, 9, 12]
    assert reports[-1].loss < reports[0].loss
    tokens = sum(len(TRAIN[n].ids) for step in range(12) for n in trained.sampler.at(step))
    assert reports[-1].tokens == trained.progress.tokens == tokens
    assert reports[-1].epoch == 2.0
    saved = [event.folder.name for event in events if isinstance(event, Saved)]
    assert saved == [f"step-{step:07d}" for step in (3, 6, 9, 12)]
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == saved[2:]


def test_the_loss_is_the_mean_over_tokens_however_a_step_is_cut_up(tmp_path: Path) -> None:
    sgd = replace(PLAN, steps=4, optimizer="sgd")
    plans = [replace(sgd, batch_size=n, accumulate=4 // n) for n in (1, 2, 4)]
    first, *others = (
        run(trainer(tmp_path / str(plan.batch_size), plan, LoRAConfig(rank=4))) for plan in plans
    )
    assert all(close(first, other, 1e-5) for other in others)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_learns_and_resumes_from_its_state(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full training has parameters in every group of an optimizer."""
    peak = {"sgd": 0.3, "muon": 0.1}.get(optimizer, 1e-2)
    plan = replace(PLAN, optimizer=optimizer, weight_decay=0.01, schedule=Schedule(peak=peak))
    plan = replace(plan, steps=8, accumulate=1, evaluate_every=8)
    method, events = LoRAConfig(kind="full"), list[Event]()
    straight = run(trainer(tmp_path / "straight", plan, method, events))
    losses = [event.loss for event in events if isinstance(event, Validated)]
    assert losses[-1] < losses[0] - 0.1
    part = trainer(tmp_path / "part", plan, method)
    stop_after(monkeypatch, part, 5)
    assert not part.run()
    again = trainer(tmp_path / "part", plan, method)
    assert again.resume()
    assert again.progress.step == 5
    assert alike(run(again), straight)


def stop_after(patch: pytest.MonkeyPatch, trainer: Trainer, steps: int) -> None:
    """Interrupts a run during step `steps`, as Ctrl-C does."""
    step = trainer._step

    def stopping() -> None:
        if trainer.progress.step == steps - 1:
            os.kill(os.getpid(), signal.SIGINT)
        step()

    patch.setattr(trainer, "_step", stopping)


@pytest.mark.parametrize("steps", [1, 3, 4, 11, 12])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    steps: int, whole: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    part = trainer(tmp_path / "part", events=events)
    stop_after(monkeypatch, part, steps)
    before = signal.getsignal(signal.SIGINT)
    assert part.run() is (steps == PLAN.steps)  # nothing is left to do
    assert signal.getsignal(signal.SIGINT) is before
    assert any("stopping after" in note for note in notes(events))
    again = trainer(tmp_path / "part")
    assert again.resume()
    assert again.progress.step == steps
    assert alike(run(again), whole)
    assert replace(again.progress, best=0.0) == replace(whole.progress, best=0.0)


@pytest.mark.parametrize(("steps", "validated"), [(3, False), (4, True)])
def test_a_validation_is_claimed_only_where_one_was_made(
    steps: int, validated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    still = replace(PLAN, schedule=Schedule(peak=1e-30), steps=5)
    part = trainer(tmp_path, still, events=events)
    stop_after(monkeypatch, part, steps + 1 if validated else steps)
    part.run()
    made = any(isinstance(event, Validated) and event.step for event in events)
    assert made is part.progress.is_validated is validated
    assert ("the validation loss never improved" in "".join(notes(events))) is validated


def test_layers_computed_twice_give_the_same_run(whole: Trainer, tmp_path: Path) -> None:
    assert close(run(trainer(tmp_path, replace(PLAN, checkpointing=True))), whole, 1e-4)


@pytest.mark.skipif(which("c++") is None, reason="MLX compiles for a CPU with a C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_as_on_a_gpu_it_is_the_same_run(
    checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(PLAN, steps=4, checkpointing=checkpointing)
    whole = run(trainer(tmp_path / "a", plan))
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(device, "slow_exponentials", lambda: False)
    mx.enable_compile()
    try:
        compiled = run(trainer(tmp_path / "b", plan))
    finally:
        mx.disable_compile()
    assert close(compiled, whole, 1e-4)


def test_a_run_ends_early_when_it_gets_no_better(tmp_path: Path) -> None:
    plan = replace(PLAN, schedule=Schedule(peak=1e-9), evaluate_every=1, patience=3, steps=50)
    events: list[Event] = []
    trained = run(trainer(tmp_path, plan, events=events, valid=[sample(4, 5)]))
    assert trained.progress.step < 50
    assert any("ended early" in note for note in notes(events))


def test_without_validation_the_last_is_kept(tmp_path: Path) -> None:
    kept: list[int] = []
    run(trainer(tmp_path, replace(PLAN, steps=3), valid=[], keep=lambda: kept.append(1)))
    assert kept == [1]


# Failures


@pytest.mark.parametrize(
    ("steps", "note"),
    [
        ({5}, "step 5 skipped: its loss or gradients are not finite"),
        ({7, 8, 9}, "rolled back to the weights of step 6"),
    ],
)
def test_steps_that_are_not_finite_are_skipped_or_rolled_back(
    steps: set[int], note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = []
    trained = trainer(tmp_path, events=events)
    spoil(monkeypatch, trained, steps)
    run(trained)
    assert notes(events)[-1] == note
    assert (trained.progress.step, trained.progress.rolled_back) == (12, 0)
    assert all(mx.isfinite(array).all().item() for array in trained.parameters.values())
    losses = [event.loss for event in events if isinstance(event, Trained)]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize("steps", [12, 8, 6])
def test_failures_without_end_end_the_run(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if few steps are left after a rollback, or none."""
    trained = trainer(tmp_path, replace(PLAN, steps=steps))
    spoil(monkeypatch, trained, set(range(4, 100)))
    with pytest.raises(NumericsError, match="lower the learning rate"):
        trained.run()
    assert checkpoint.checkpoints(tmp_path)


def spoil(patch: pytest.MonkeyPatch, trainer: Trainer, steps: set[int]) -> None:
    """Makes the gradients of these steps NaN."""
    compute = trainer._sums_and_gradients

    def spoiled(*arguments: Any) -> Any:
        sums, gradients = compute(*arguments)
        if trainer.progress.step + 1 in steps:
            gradients = {name: array * mx.nan for name, array in gradients.items()}
        return sums, gradients

    patch.setattr(trainer, "_sums_and_gradients", spoiled)


def test_a_full_disk_is_an_error_and_the_checkpoint_before_it_stays(
    whole: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save: Callable[..., None] = mx.save_safetensors
    calls = Counter[str]()

    def full(path: str, *rest: Any) -> None:
        calls["all"] += 1
        if calls["all"] > 3:
            raise RuntimeError("[write] Unable to write 8 bytes to file")
        save(path, *rest)

    monkeypatch.setattr(checkpoint.mx, "save_safetensors", full)
    with pytest.raises(StorageError, match="free some space"):
        trainer(tmp_path).run()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000003"]
    again = trainer(tmp_path)
    assert again.resume()
    assert alike(run(again), whole)


def test_another_run_cannot_be_resumed_by_mistake(whole: Trainer, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{"seed": 1}, {"batch_size": 4}, {"steps": 13}]
    for change in [*changes, {"schedule": Schedule(peak=1.0)}]:
        with pytest.raises(InvalidArgumentError, match=r"--resume: .* started with another"):
            trainer(whole.folder, replace(PLAN, **change)).resume()
    with pytest.raises(InvalidArgumentError, match="started with other training or"):
        trainer(whole.folder, identity={"data": "x"}).resume()
    assert not trainer(tmp_path / "none").resume()


def test_a_damaged_checkpoint_is_a_named_error(whole: Trainer, tmp_path: Path) -> None:
    shutil.copytree(whole.folder, tmp_path, dirs_exist_ok=True)
    latest = checkpoint.checkpoints(tmp_path)[-1] / "config.json"
    for text in ("", "{}", '{"progress": {"x": 1}, "run": {}}', "[]"):
        latest.write_text(text)
        with pytest.raises(Exception, match=r"expected a checkpoint's state \(config\.json"):
            trainer(tmp_path).resume()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: replace(PLAN, steps=0), "steps must be 1 or more"),
        (lambda: replace(PLAN, patience=0), "patience must be 1 or more"),
        (lambda: replace(PLAN, schedule=Schedule(warmup=12)), "warmup must be less than the 12"),
        (lambda: Schedule(kind="step"), "schedule must be one of cosine"),
        (lambda: Schedule(peak=float("nan")), "peak must be above 0"),
        (lambda: Optimizer("adam"), "optimizer must be one of adamw"),
        (lambda: Optimizer("adamw", 1.0), "weight_decay must be 0 or more and below 1"),
    ],
)
def test_options_out_of_range_are_refused(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        wrong()


# Optimizers and schedules


def test_schedules_rise_to_the_peak_and_fall_to_the_floor() -> None:
    for kind in SCHEDULES:
        schedule = Schedule(kind=kind, peak=1.0, warmup=10, floor=0.1)
        rates = [schedule.at(step, 110) for step in range(110)]
        assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
        assert max(rates) == 1.0
        if kind == "constant":
            assert set(rates[10:]) == {1.0}
            continue
        assert rates[10:] == sorted(rates[10:], reverse=True)
        assert rates[-1] == pytest.approx(0.1, abs=0.1)
    wsd = Schedule(kind="wsd", peak=1.0, warmup=10)
    assert [wsd.at(step, 110) for step in range(10, 99)] == [1.0] * 89
    assert wsd.at(109, 110) < 0.3


def test_vectors_do_not_decay() -> None:
    parameters = {"model.layers.0.w": mx.ones((4, 4)), "m": mx.ones(4)}
    zero = {name: mx.zeros_like(array) for name, array in parameters.items()}
    after = Optimizer("adamw", 0.1).step(0.5, zero, parameters)
    assert mx.allclose(after["m"], mx.ones(4))
    assert mx.allclose(after["model.layers.0.w"], 0.95 * mx.ones((4, 4)))


def test_clipping_keeps_directions() -> None:
    gradients = {"a": mx.array([3.0, 0.0]), "b": mx.array([[4.0]])}
    clipped, norm = clip(gradients, 1.0)
    assert norm.item() == pytest.approx(5.0)
    assert clipped["a"].tolist() == pytest.approx([0.6, 0.0], rel=1e-4)
    assert clipped["b"].item() == pytest.approx(0.8, rel=1e-4)
    assert mx.array_equal(clip(gradients, 6.0)[0]["a"], gradients["a"])


def test_checkpoints_are_plain_files(whole: Trainer) -> None:
    latest = checkpoint.checkpoints(whole.folder)[-1]
    names = {"config.json", "optimizer.safetensors", "parameters.safetensors"}
    assert {path.name for path in latest.iterdir()} == names
    assert json.loads((latest / "config.json").read_text())["progress"]["step"] == 12
