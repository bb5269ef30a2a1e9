"""How often a run validates and saves, so that both take little of its time; and resumed runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import minicpm_mlx as mm
from minicpm_mlx.train import checkpoint, trainer
from minicpm_mlx.train import finetune as runs
from minicpm_mlx.train.data.batches import length
from minicpm_mlx.train.data.dataset import Data, load_data
from minicpm_mlx.train.data.samples import Item, Pair, Sample
from minicpm_mlx.train.lora import LoRAConfig
from minicpm_mlx.train.planning import TrainingOptions, TrainingPlan, plan_for
from minicpm_mlx.train.tracking.events import Event, Saved, Validated
from minicpm_mlx.train.validation import (
    plan_validation,
    representative,
    times_of,
    validation_share,
)
from support.tiny_model import write_model


def sample(tokens: int) -> Sample:
    return Sample([1] * tokens, [False] + [True] * (tokens - 1))


def data_of(train: list[Item], valid: list[Item], kind: str = "sft") -> Data:
    rest: dict[str, Any] = {"test": [], "counts": {}, "sha256": {}}
    rest |= dict.fromkeys(("notes", "bad", "overlong", "prompts"), ())
    return Data(train=train, valid=valid, format="", kind=kind, max_seq_length=2048, **rest)


@pytest.mark.parametrize(
    ("train", "valid", "steps", "expected"),
    [
        (180, 20, 30, (30, 13)),  # ten validations of 20 took longer than the training
        (900, 100, 675, (85, 66)),  # three epochs
        (20_000, 200, 15_000, (1500, 200)),
        (9000, 2000, 2250, (225, 181)),
        (36, 4, 20, (7, 4)),
        (16, 4, 4, (4, 1)),
    ],
)
def test_validation_is_planned_within_a_tenth(
    train: int, valid: int, steps: int, expected: tuple[int, int]
) -> None:
    data = data_of([sample(50)] * train, [sample(50)] * valid)
    every, samples = plan_validation(data, steps=steps, samples_a_step=4)
    assert (every, samples) == expected
    share = validation_share(data, steps=steps, samples_a_step=4, every=every, samples=samples)
    assert share <= 0.1
    often = validation_share(
        data, steps=steps, samples_a_step=4, every=-(-steps // 10), samples=None
    )
    assert often >= share


@given(
    st.lists(st.integers(2, 400), min_size=1, max_size=60),
    st.lists(st.integers(2, 400), min_size=1, max_size=60),
    st.integers(1, 500),
    st.integers(1, 16),
    st.booleans(),
)
def test_any_run_validates_before_and_after_within_its_share(
    train: list[int], valid: list[int], steps: int, size: int, pairs: bool
) -> None:
    def items(lengths: list[int]) -> list[Item]:
        return [Pair(sample(n), sample(n)) if pairs else sample(n) for n in lengths]

    data = data_of(items(train), items(valid), "preference" if pairs else "sft")
    every, samples = plan_validation(data, steps=steps, samples_a_step=size)
    share = validation_share(data, steps=steps, samples_a_step=size, every=every, samples=samples)
    assert 2 <= times_of(steps, every) <= 11
    assert 1 <= samples <= len(valid)
    assert share <= 0.1 + 1e-9 or samples == 1


def test_patience_can_run_out() -> None:
    data = data_of([sample(9)] * 100, [sample(9)] * 20)
    every, samples = plan_validation(data, steps=30, samples_a_step=4, patience=3)
    assert times_of(30, every) >= 5
    assert validation_share(data, steps=30, samples_a_step=4, every=every, samples=samples) <= 0.1


def test_the_samples_are_of_all_lengths_and_always_the_same() -> None:
    items: list[Item] = [sample(n) for n in (90, 10, 50, 20, 70, 30, 60, 40, 80, 100)]
    assert list(map(length, representative(items, 5))) == [20, 40, 60, 80, 100]
    assert list(map(length, representative(items, 1))) == [60]
    assert representative(items, None) == representative(items, 99) == items


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Data:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}."} for n in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_data(path, mm.load_tokenizer(model))


def planned(model: Path, data: Data, **options: Any) -> TrainingPlan:
    given = TrainingOptions(iters=12, batch_size=2, accumulate=1, learning_rate=0.01, **options)
    return plan_for(data, given, mm.Config.load(model), LoRAConfig())[0]


def run(model: Path, data: Data, folder: Path, plan: TrainingPlan, **rest: Any) -> list[Event]:
    events: list[Event] = []
    lm = mm.load(model, fuse=False, dtype="float32")
    mm.finetune(lm, data, folder, plan=plan, listener=events.append, **rest)
    return events


def validations(events: list[Event]) -> list[tuple[int, float]]:
    return [(event.step, event.loss) for event in events if isinstance(event, Validated)]


def test_what_is_given_is_done(model: Path, data: Data) -> None:
    plan = planned(model, data, evaluate_every=1, save_every=1)
    assert (plan.evaluate_every, plan.validation_samples, plan.save_every) == (1, None, 1)


def test_a_resumed_run_validates_where_it_would_have(
    model: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(model, data, save_every=5)
    assert (plan.evaluate_every, plan.validation_samples) == (12, 2)
    straight = run(model, data, tmp_path / "a", plan)
    assert [step for step, _ in validations(straight)] == [0, 12]
    step = trainer.Trainer._step

    def failing(self: trainer.Trainer) -> None:
        if self.progress.step == 7:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(trainer.Trainer, "_step", failing)
    with pytest.raises(KeyboardInterrupt):
        run(model, data, tmp_path / "b", plan)
    monkeypatch.undo()
    other = planned(model, data, patience=4)  # as a later version might plan
    assert other.evaluate_every != plan.evaluate_every
    resumed = run(model, data, tmp_path / "b", other, resume=True)
    assert validations(resumed) == validations(straight)[1:]
    weights = [(tmp_path / name / "adapters.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    with pytest.raises(mm.MiniCPMError, match="another --steps-per-eval: it was 12, and is 3"):
        run(model, data, tmp_path / "b", planned(model, data, evaluate_every=3), resume=True)


def test_a_run_of_an_older_version_goes_on_as_it_began(
    model: Path, data: Data, tmp_path: Path
) -> None:
    plan = planned(model, data, save_every=5)
    run(model, data, tmp_path / "a", plan)
    latest = checkpoint.checkpoints(tmp_path / "a" / runs.CHECKPOINTS)[-1] / "config.json"
    record = json.loads(latest.read_text())
    for name in checkpoint.SCHEDULE:
        del record["run"][name]
    latest.write_text(json.dumps(record))
    resumed = runs.resumed_plan(tmp_path / "a", plan)
    assert (resumed.evaluate_every, resumed.validation_samples) == (2, None)
    assert run(model, data, tmp_path / "a", plan, resume=True)


@pytest.mark.parametrize(("share", "steps"), [(1e9, [2, 4, 6, 8, 10, 12]), (0.0, [12])])
def test_checkpoints_that_would_take_long_are_left_out(
    share: float,
    steps: list[int],
    model: Path,
    data: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer, "SHARE", share)
    plan = planned(model, data)
    assert plan.save_every is None
    events = run(model, data, tmp_path / "a", plan)
    assert [event.step for event in events if isinstance(event, Saved)] == steps
    events = run(model, data, tmp_path / "b", replace(plan, save_every=6))
    assert [event.step for event in events if isinstance(event, Saved)] == [6, 12]
