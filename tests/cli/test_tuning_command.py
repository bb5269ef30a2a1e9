"""Tuning from the command line: asked for, and once after a model is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm_mlx import Config, device
from minicpm_mlx.bench import tuning as bench
from minicpm_mlx.bench.comparison import judge
from minicpm_mlx.bench.contender import ContenderError
from minicpm_mlx.bench.tuning import Trial
from minicpm_mlx.cli.models import tuning
from minicpm_mlx.cli.models.tuning import tune_new
from minicpm_mlx.loading.tuning import VARIABLE, Tuning, load_tuning, model_key
from support.tiny_model import write_model

TRIALS = [
    Trial(name="zero columns (all)", verdict=judge([1.0] * 16, [0.8] * 16)),
    Trial(name="own kernels off", verdict=judge([1.0] * 16, [1.0] * 16)),
    Trial(name="groups of 32", problem=bench.NO_TIME),
]


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A GPU on which the tuner finds zero columns faster, and a terminal."""
    monkeypatch.setenv("MINICPM_MLX_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("LC_ALL", "en_US.UTF-8")
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(device, "on_metal", lambda: True)
    monkeypatch.setattr(device, "select", lambda *_: None)
    monkeypatch.setattr(device, "chip", lambda: "Apple M1")
    monkeypatch.setattr(bench, "tune_model", lambda *_: (Tuning(wide="all"), TRIALS))
    monkeypatch.setattr(tuning, "shows_progress", lambda: True)
    return monkeypatch


@pytest.fixture
def new(tmp_path: Path, mac: pytest.MonkeyPatch) -> Path:
    """A model that is in a folder only once it was asked for."""
    folder = write_model(tmp_path / "tiny")
    mac.setattr(tuning, "kept_folder", lambda card: None)
    return folder


def kept(folder: Path) -> Tuning | None:
    key = model_key(Config.load(folder), folder)
    return load_tuning("Apple M1", key, device.mlx_version())


def test_a_table_tells_what_was_kept(
    command: Callable[..., int], mac: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = write_model(tmp_path / "tiny")
    assert command("bench", "--tune", "-m", str(folder)) == 0
    out = capsys.readouterr().out
    assert "| zero columns (all) | 1.250 (1.250–1.250) | 16 | yes |" in out
    assert "| groups of 32 | no time left |  |  |" in out
    assert f"Kept: zero columns (all). {VARIABLE}=off runs without." in out
    assert kept(folder) == Tuning(wide="all")
    assert command("bench", "--tune", "-m", str(folder), "--json") == 0
    assert json.loads(capsys.readouterr().out)["settings"] == {"wide": "all"}


def test_a_stated_setting_is_not_tuned_over(
    command: Callable[..., int], mac: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mac.setenv(VARIABLE, "off")
    assert command("bench", "--tune", "-m", "2b-shape") == 1
    assert f"{VARIABLE} is set" in capsys.readouterr().err


def test_a_model_that_does_not_run_is_an_error_of_one_line(
    command: Callable[..., int], mac: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ContenderError("not enough memory")

    mac.setattr(bench, "tune_model", fail)
    assert command("bench", "--tune", "-m", "2b-shape") == 1
    assert "could not be run to be measured: not enough memory" in capsys.readouterr().err


def test_a_new_model_is_tuned_once(new: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune_new(str(new))
    err = capsys.readouterr().err
    assert "20 s at most; Ctrl-C skips it" in err
    assert "zero columns (all)" in err
    assert kept(new) == Tuning(wide="all")
    tune_new(str(new))
    assert capsys.readouterr().err == ""


def test_ctrl_c_skips_it(
    new: Path, mac: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    mac.setattr(bench, "tune_model", interrupt)
    tune_new(str(new))
    assert "skipped; later: minicpm-mlx bench --tune" in capsys.readouterr().err
    assert kept(new) is None


@pytest.mark.parametrize("reason", ["no GPU", "no terminal", "switched off", "known"])
def test_nothing_is_measured_unasked(
    reason: str, new: Path, mac: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if reason == "no GPU":
        mac.setattr(device, "on_metal", lambda: False)
    elif reason == "no terminal":
        mac.setattr(tuning, "shows_progress", lambda: False)
    elif reason == "switched off":
        mac.setenv(VARIABLE, "off")
    else:
        mac.setattr(tuning, "kept_folder", lambda card: card.path)
    tune_new(str(new))
    assert capsys.readouterr().err == ""
