"""`minicpm-mlx eval` as it is used: what it prints, where, and with which status."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from minicpm_mlx.cli.render import theme
from minicpm_mlx.evals import run as runs
from support.eval_data import write_all
from support.little_bench import local_judge, write_bench
from support.tiny_model import write_model

Command = Callable[..., int]
Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    theme.console.cache_clear()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("tiny") / "tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_all(tmp_path_factory.mktemp("data")))


def words(model: str, data: str, folder: Path, *more: str) -> list[str]:
    begin = ["eval", "--tasks", "arc_easy,hellaswag", "--mode", "ppl", "--limit", "4"]
    return [*begin, "--data", data, "--model", model, "--output", str(folder), *more]


def test_scores_are_printed_under_the_models_name_and_of_a_folder_alone(
    command: Command, capsys: Out, model: str, data: str, tmp_path: Path
) -> None:
    assert command(*words(model, data, tmp_path / "out")) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[:3] == [f"# {Path(model).name}", "", "| set | score | 95 % | questions |"]
    assert lines[4].startswith("| ARC-E | ")
    assert lines[-1].startswith("| Mean of all |")
    assert err.splitlines()[0].startswith("ARC-E ppl, 4 of 4, ")
    assert "no published scores beside: the README's are of models as published" in err
    assert f"details: {tmp_path / 'out' / 'report.md'}" in err


def test_json_is_the_report(
    command: Command, capsys: Out, model: str, data: str, tmp_path: Path
) -> None:
    assert command(*words(model, data, tmp_path / "out", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert report["tasks"][0]["parts"]["ppl"]["done"] == 4


def test_a_run_goes_on_and_another_setting_is_refused(
    command: Command,
    capsys: Out,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    data: str,
    tmp_path: Path,
) -> None:
    add = runs._ProgressMeter.add

    def interrupted(meter: runs._ProgressMeter, score: float) -> None:
        add(meter, score)
        if meter.done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(runs._ProgressMeter, "add", interrupted)
    assert command(*words(model, data, tmp_path / "out")) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert f"finished work is kept in {tmp_path / 'out'}; the same command resumes it" in err
    monkeypatch.undo()
    other = words("minicpm-2b-dpo", data, tmp_path / "out", "--seed", "1")
    assert command(*other) == 1  # before that model is looked for
    assert "arc_easy.ppl's seed is 0, not 1" in capsys.readouterr().err
    path = tmp_path / "out" / "records" / "arc_easy.ppl.jsonl"
    begun = path.read_bytes()
    assert begun.count(b"\n") == 2
    assert command(*words(model, data, tmp_path / "out")) == 0
    assert path.read_bytes().startswith(begun)
    assert path.read_bytes().count(b"\n") == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tasks", "humaneval", "--mode", "gen"), "--allow-code"),
        (("--tasks", "all", "--mode", "gen"), "humaneval and mbpp: these tasks run programs"),
        (("--tasks", "mmlu"), "--mode ppl is for arc_easy, arc_challenge, hellaswag"),
        (("--tasks", "chess"), "--tasks must be of ceval"),
        (("--data", "nowhere"), "--data nowhere: expected a folder"),
        (
            ("--subjects", "astrology"),
            "--subjects must be of a task that has any",
        ),
        (("--shots", "3"), "--shots is for mode gen"),
        (("--chat-template",), "--chat-template is for mode gen"),
        (("--sampling", "ultraeval"), "--sampling is for mode gen"),
        (("--whole-replies",), "--whole-replies is for mode gen"),
        (("--tasks", "arc_easy", "--mode", "gen", "--shots", "99"), "ask for fewer examples"),
    ],
)
def test_what_cannot_be_done_is_said_before_a_model_is_loaded(
    command: Command, capsys: Out, data: str, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    assert command(*words("minicpm-2b-dpo", data, tmp_path / "out", *more)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_tasks_must_be_named(command: Command, capsys: Out) -> None:
    assert command("eval") == 1
    assert "expected --tasks: all, or some of ceval,cmmlu" in capsys.readouterr().err


def test_two_runs_are_compared(
    command: Command, capsys: Out, model: str, data: str, tmp_path: Path
) -> None:
    for name, limit in (("a", "4"), ("b", "3")):
        assert command(*words(model, data, tmp_path / name, "--limit", limit)) == 0
    capsys.readouterr()
    folders = str(tmp_path / "a"), str(tmp_path / "b")
    assert command("eval", "compare", *folders) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"1: tiny ({folders[0]}), 2: tiny ({folders[1]})"
    assert lines[4].startswith("| arc_easy.ppl | ")
    assert lines[4].endswith("| -39.2 to +39.2 | 1 (mcnemar) | 3 | 0 | 0 |")
    assert lines[-1] == "hellaswag.ppl: questions scored in only one of the runs: 1"
    assert command("eval", "compare", *folders, "--json") == 0
    assert json.loads(capsys.readouterr().out)["parts"]["arc_easy.ppl"]["comparison"]["p"] == 1
    assert command("eval", "compare", folders[0], str(tmp_path / "c")) == 1
    assert "expected the settings of a run" in capsys.readouterr().err


def test_mt_bench_is_answered_and_judged(
    command: Command, capsys: Out, model: str, tmp_path: Path
) -> None:
    bench = str(write_bench(tmp_path))
    begin = ["eval", "mt-bench", "--data", bench, "--model", model]
    begin += ["--output", str(tmp_path / "out"), "--max-tokens", "8"]
    assert command(*begin) == 0
    assert "they are not rated, as there is no judge" in capsys.readouterr().err
    with local_judge() as judge:
        assert command(*begin, "--judge-url", judge.url, "--judge-model", "wise") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("MT-Bench 7.00")
    assert "README" not in out
    assert (tmp_path / "out" / "radar.png").exists() or not find_spec("matplotlib")
    assert "6 of 6 judgements by wise have a rating" in err
    assert command(*begin, "--judge-key-file", __file__) == 1
    assert "--judge-key-file is for --judge-url" in capsys.readouterr().err


def test_help_loads_no_model_library() -> None:
    code = (
        "import sys; from minicpm_mlx.cli.main import app; "
        "app(['eval', '--help'], standalone_mode=False); "
        "print([name for name in ('mlx.core', 'mlx_lm', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for name in ("--tasks", "--allow-code", "compare", "mt-bench"):
        assert name in done.stdout
