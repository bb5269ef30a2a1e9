"""The tuner: what it tries, what it keeps, and how what it kept is applied."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import minicpm_mlx as mm
from minicpm_mlx import device, load_model
from minicpm_mlx.bench import tuning as tuning_bench
from minicpm_mlx.bench.contender import Contender, ContenderError
from minicpm_mlx.bench.tuning import Tuner, buffer_candidates, draft_costs
from minicpm_mlx.engine import PromptLookup, Speculation
from minicpm_mlx.errors import InvalidArgumentError
from minicpm_mlx.loading import tuning
from minicpm_mlx.loading.tuning import (
    DRAFT_COSTS,
    VARIABLE,
    Tuning,
    keep_tuning,
    kept_buffers,
    load_tuning,
    model_key,
    parse,
    tuning_for,
)
from minicpm_mlx.model.config import Config
from support.tiny_model import write_model

FACTS = {
    **{"wide": ["inner", "all"], "groups": [32], "own_kernels": True, "chunk": 2048},
    **{"longest": 4096, "bytes": 1000},
}
COSTS = tuple(0.1 * n for n in range(1, DRAFT_COSTS + 1))
SETTINGS = Tuning(buffers=(0, 0), wide="inner", own_kernels=False, draft_costs=COSTS)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of kept results, in a cache folder of the test's own."""
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path / "tuning.json"


@dataclass
class Machine:
    """Contestants whose decode steps take the times that are planted, on a clock that they move."""

    factor: Callable[[Tuning], float]
    seed: int = 0
    facts: Any = None
    now: float = 0.0
    running: int = 0

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    def start(self, settings: Tuning, seconds: float) -> FakeContestant:
        self.now += 1.0
        if seconds <= 0:
            raise ContenderError("too late")
        self.running += 1
        return FakeContestant(self, settings)

    def tuner(self, budget: float = 180.0) -> Tuner:
        return Tuner(self.start, budget, clock=lambda: self.now)


class FakeContestant:
    def __init__(self, machine: Machine, settings: Tuning):
        self.machine, self.settings = machine, settings
        self.facts, self.open = machine.facts or FACTS, True

    def measure(self, work: str, number: int, seconds: float = 60) -> float:
        machine = self.machine
        noise = math.exp(machine.chance.gauss(0, 0.02))
        if work == "decode":
            taken = 0.01 * number * machine.factor(self.settings) * noise
        elif work == "prefill":
            taken = 0.1 * noise * (0.9 if number == 512 else 1.0)
        else:
            taken = 0.01 * (1 + 0.1 * (number - 1))
        machine.now += taken
        return taken

    def close(self) -> None:
        self.machine.running -= self.open
        self.open = False


def test_the_faster_setting_is_kept_twenty_times_of_twenty() -> None:
    for seed in range(20):
        machine = Machine(lambda t: 0.94 if t.wide == "all" else 1.0, seed)
        found = machine.tuner().run()
        assert found.wide == "all"
        assert found.own_kernels
        assert found.group_size is None
        assert found.prefill_chunk == 512
        assert machine.running == 0


def test_the_defaults_are_kept_where_nothing_is_faster() -> None:
    for seed in range(20):
        machine = Machine(lambda t: 1.0 if t == Tuning() else 1.01, seed)
        machine.facts = {**FACTS, "chunk": 128}
        assert machine.tuner().run().changed().keys() == {"draft_costs"}


def test_gains_add_up() -> None:
    gains = {"inner": 0.95, "all": 1.1, None: 1.0}
    machine = Machine(lambda t: gains[t.wide] * (1.0 if t.own_kernels else 0.93))
    found = machine.tuner().run()
    assert (found.wide, found.own_kernels) == ("inner", False)


@pytest.mark.parametrize("budget", [1.5, 4.0, 12.0])
def test_the_budget_is_kept(budget: float) -> None:
    machine = Machine(lambda t: 1.0)
    tuner = machine.tuner(budget)
    tuner.run()
    assert machine.now < budget + 2
    assert machine.running == 0
    assert any(trial.problem == tuning_bench.NO_TIME for trial in tuner.trials)


def test_settings_that_do_not_run_are_said_and_passed_over() -> None:
    class Picky(Machine):
        def start(self, settings: Tuning, seconds: float) -> FakeContestant:
            if settings.wide:
                raise ContenderError("not enough memory")
            return super().start(settings, seconds)

    machine = Picky(lambda t: 1.0 if t.own_kernels else 0.9)
    tuner = machine.tuner()
    assert not tuner.run().own_kernels
    problems = {trial.name: trial.problem for trial in tuner.trials if trial.problem}
    assert problems == dict.fromkeys(
        ("zero columns (all)", "zero columns (inner)"), "not enough memory"
    )


def test_a_large_model_is_not_loaded_twice() -> None:
    machine = Machine(lambda t: 0.5 if t.wide else 1.0)
    machine.facts = {**FACTS, "bytes": device.total_memory() // 2}
    tuner = machine.tuner()
    assert tuner.run().wide is None
    assert "do not fit" in str(tuner.trials[0].problem)


def test_an_interruption_ends_the_processes() -> None:
    class Interrupted(Machine):
        def factor_of(self, settings: Tuning) -> float:
            if settings.wide:
                raise KeyboardInterrupt
            return 1.0

    machine = Interrupted(lambda t: 1.0)
    machine.factor = machine.factor_of
    with pytest.raises(KeyboardInterrupt):
        machine.tuner().run()
    assert machine.running == 0


def test_buffers_are_candidates_on_a_mac_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert buffer_candidates() == [] or sys.platform == "darwin"
    monkeypatch.setattr(device, "command_buffers", "1000 kernels")
    monkeypatch.setattr(device, "buffers_given", False)
    monkeypatch.setattr(device, "mac_chip", lambda: "Apple M1")
    monkeypatch.setattr(device, "total_memory", lambda: 8 * 2**30)
    assert buffer_candidates() == [(0, 0), (200, 51)]
    monkeypatch.setattr(device, "mac_chip", lambda: "Apple M5")
    assert buffer_candidates() == [(1000, 102), (200, 51)]
    monkeypatch.setattr(device, "buffers_given", True)
    assert buffer_candidates() == []


def test_costs_of_drafts_are_interpolated_and_never_fall() -> None:
    costs = draft_costs({1: 1.0, 2: 1.4, 3: 1.3, 5: 1.5, 9: 1.9, 17: 2.7})
    assert len(costs) == DRAFT_COSTS
    assert list(costs) == sorted(costs)
    assert costs[0] == costs[1] == 0.4
    assert costs[-1] == pytest.approx(1.7)


def test_measured_costs_bound_the_drafts() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12] * 3
    cheap, steep = Speculation(PromptLookup()), Speculation(PromptLookup())
    steep.use_costs((0.05, 0.1, *(9.0 + n for n in range(DRAFT_COSTS - 2))))
    assert len(cheap.draft_tokens(text, 100)) > 2
    assert len(steep.draft_tokens(text, 100)) == 2


# ---- what is kept


def test_results_are_kept_by_chip_model_and_mlx(kept: Path) -> None:
    keep_tuning("M1", "a", "0.32.4", SETTINGS)
    keep_tuning("M1", "b", "0.32.4", Tuning(wide="all"))
    keep_tuning("M1", "b", "0.32.4", Tuning(wide="inner"))
    assert load_tuning("M1", "a", "0.32.4") == SETTINGS
    assert load_tuning("M1", "b", "0.32.4") == Tuning(wide="inner")
    assert load_tuning("M2", "a", "0.32.4") is load_tuning("M1", "a", "0.33.0") is None
    assert len(json.loads(kept.read_text())["entries"]) == 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"format": 1, "entries": [{"chip": "M1", "mod',
        "[]",
        "7",
        '{"format": 2, "entries": []}',
        '{"format": 1, "entries": {"chip": "M1"}}',
        '{"format": 1, "entries": [7, null, {"chip": "M1"}, {"chip": 1, "model": [], "mlx": {}}]}',
        '{"format": 1, "entries": [{"chip": "M1", "model": "a", "mlx": "1", "settings": '
        '{"wide": "../x"}}]}',
        "[" * 100_000,
        "\x00\xff",
        " " * (tuning.LARGEST + 1),
    ],
)
def test_a_torn_or_foreign_file_is_ignored(kept: Path, text: str) -> None:
    kept.write_text(text, encoding="latin-1")
    assert load_tuning("M1", "a", "1") is None
    keep_tuning("M1", "a", "1", SETTINGS)
    assert load_tuning("M1", "a", "1") == SETTINGS


def test_two_writers_leave_a_whole_file(kept: Path) -> None:
    def write(name: str) -> None:
        for _ in range(20):
            keep_tuning("M1", name, "1", SETTINGS)

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads(kept.read_text())["entries"]) == 2


@pytest.mark.parametrize(
    "raw",
    [
        {"wide": "both"},
        {"buffers": [1]},
        {"buffers": [0, 5]},
        {"buffers": [-1, 5]},
        {"buffers": [True, 5]},
        {"prefill_chunk": 0},
        {"draft_costs": [1.0]},
        {"draft_costs": [float("nan")] * DRAFT_COSTS},
        {"own_kernels": 1},
        {"group_size": 16},
        {"unknown": 1},
        [],
    ],
)
def test_settings_out_of_range_are_refused(raw: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"expected|out of range"):
        parse(raw)
    monkeypatch.setenv(VARIABLE, json.dumps(raw))
    with pytest.raises(InvalidArgumentError, match=VARIABLE):
        tuning_for("M1", "a", "1")


def test_the_environment_decides(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_tuning("M1", "a", "1", SETTINGS)
    assert tuning_for("M1", "a", "1") == SETTINGS
    assert kept_buffers("M1", "1") == (0, 0)
    monkeypatch.setenv(VARIABLE, "off")
    assert tuning_for("M1", "a", "1") == Tuning()
    assert kept_buffers("M1", "1") is None
    monkeypatch.setenv(VARIABLE, '{"wide": "all", "buffers": [9, 8]}')
    assert tuning_for("M1", "a", "1") == Tuning(wide="all", buffers=(9, 8))
    assert kept_buffers("M1", "1") == (9, 8)
    monkeypatch.setenv(VARIABLE, "{")
    assert kept_buffers("M1", "1") is None
    with pytest.raises(InvalidArgumentError):
        tuning_for("M1", "a", "1")


def test_kept_results_are_applied_when_a_model_is_loaded(kept: Path, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    key = model_key(Config.load(folder), folder)
    keep_tuning(
        device.chip(), key, device.mlx_version(), Tuning(prefill_chunk=64, draft_costs=COSTS)
    )
    pace = mm.load(folder).model.pace
    assert pace.most_prefill == 64
    assert pace.draft_costs == COSTS
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert model_key(Config.load(folder), folder) == key
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    assert model_key(Config.load(folder), folder) != key


@pytest.mark.slow
def test_kept_zero_columns_are_in_memory_alone(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., int]
) -> None:
    write_model(tmp_path / "tiny")
    folder = tmp_path / "small"
    options = ("--method", "rtn", "--bits", "4", "--group-size", "32")
    assert command("quantize", str(tmp_path / "tiny"), str(folder), *options) == 0
    monkeypatch.setattr(device, "unpack_to", lambda *_: None)  # as on a GPU
    plain = mm.load(folder)
    key = model_key(Config.load(folder), folder)
    keep_tuning(device.chip(), key, device.mlx_version(), Tuning(wide="all"))
    wide = mm.load(folder)
    assert wide.model.hidden(mx.array([[1]])).shape[-1] == 512
    assert wide.model(mx.array([[1, 7]])).shape == (1, 2, wide.config.vocab_size)
    texts = [lm.generate("Once", max_tokens=12).text for lm in (plain, wide)]
    assert texts[0] == texts[1]
    assert command("convert", str(folder), str(tmp_path / "out"), "--format", "mlx") == 0
    assert Config.load(tmp_path / "out").hidden_size == plain.config.hidden_size
    assert load_model(folder, fuse=False).model.embed_tokens.weight.shape[0] == (
        plain.config.vocab_size
    )


def test_a_contender_measures_with_its_settings(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "tiny")
    with Contender(str(folder), Tuning(prefill_chunk=64)) as contender:
        assert contender.facts["wide"] == []  # nothing is packed
        assert contender.measure("decode", 3) > 0
        assert contender.measure("prefill", 64) > 0
        assert contender.measure("rows", 4) > 0
        pid = contender.process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(ContenderError, match="ended"):
        contender.measure("decode", 3)


def test_a_contender_that_cannot_run_says_why(kept: Path, tmp_path: Path) -> None:
    with pytest.raises(ContenderError, match="nowhere"):
        Contender(str(tmp_path / "nowhere"), Tuning())


def test_on_a_cpu_there_is_nothing_to_tune(
    command: Callable[..., int], capsys: pytest.CaptureFixture[str], kept: Path
) -> None:
    assert command("bench", "--tune", "-m", "2b-shape", "--device", "cpu") == 0
    assert capsys.readouterr().out.startswith("Nothing to tune")
    assert not kept.exists()
    assert command("bench", "--tune", "-n", "3") == 1


def test_a_mac_gets_its_limits_when_the_package_is_imported(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys, platform; sys.platform = 'darwin'; platform.system = lambda: 'Darwin'; "
        "import minicpm_mlx.device as d; print('mlx.core' in sys.modules, d.command_buffers)"
    )
    for name in device.BUFFER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(VARIABLE, '{"buffers": [300, 90]}')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False 300 kernels or 90 MB (measured)\n"


def test_a_process_that_is_faster_by_chance_is_not_believed() -> None:
    """As where its memory happens to lie better: one process is faster throughout."""

    class Uneven(Machine):
        def start(self, settings: Tuning, seconds: float) -> FakeContestant:
            started = super().start(settings, seconds)
            lucky = self.now < 2.5  # the second process
            plain = started.measure
            started.measure = lambda *args: plain(*args) * (0.8 if lucky else 1)  # type: ignore[method-assign]
            return started

    machine = Uneven(lambda t: 1.0)
    machine.facts = {**FACTS, "chunk": 128}
    tuner = machine.tuner()
    assert tuner.run().changed().keys() == {"draft_costs"}
    assert machine.running == 0
