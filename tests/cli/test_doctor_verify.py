"""`minicpm-mlx doctor --verify`: its three forms, and its exit status."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from minicpm_mlx.bench import output
from minicpm_mlx.verify import operations, run
from minicpm_mlx.verify.results import CheckResult

Command = Callable[..., int]
Out = pytest.CaptureFixture[str]

ROW: dict[str, Any] = {
    **{"model": "demo-shape", "test": "tg64", "type_kv": "full", "first_token": None},
    **{"avg_ns": 10**9, "stddev_ns": 10**7, "avg_ts": 64.0, "stddev_ts": 1.25, "roofline": 0.71},
    **{"bandwidth_measured": False, "expected_ts": 80.0},
}


@pytest.fixture(autouse=True)
def one_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CHECKS", {"own kernels": operations.check_own_kernels})
    monkeypatch.setattr(run, "measure_speed", lambda: [ROW])


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> Iterator[CheckResult]:
        yield CheckResult(name="logits", format="float32", outcome="fail", expected="1", got="9")

    monkeypatch.setattr(run, "CHECKS", {"golden cases": check})


def test_the_table_names_each_check_and_the_speed(command: Command, capsys: Out) -> None:
    assert command("doctor", "--verify") == 0
    out = capsys.readouterr().out
    assert "own kernel add_norm = reference" in out
    assert "| demo-shape | tg64 | 64.00 ± 1.25 | 80 | 71 % |" in out
    assert "power: " in out
    assert " passed, " in out.splitlines()[-1]


def test_json_has_all_and_its_rows_are_those_of_bench(
    command: Command, capsys: Out, tmp_path: Any
) -> None:
    assert command("doctor", "--verify", "--json") == 0
    printed = capsys.readouterr().out
    report = json.loads(printed)
    assert report["passed"] is True
    assert report["failed"] == []
    assert {"chip", "memory_bytes", "mlx", "power", "thermal"} < set(report["machine"])
    assert {"name", "format", "outcome", "expected", "got"} == set(report["checks"][0])
    file = tmp_path / "report.json"
    file.write_text(printed)
    assert output.read(file) == [ROW]


def test_markdown_is_a_block_for_an_issue(command: Command, capsys: Out) -> None:
    assert command("doctor", "--verify", "--markdown") == 0
    out = capsys.readouterr().out
    assert out.startswith("**minicpm-mlx doctor --verify: ")
    assert "| check | result | expected | got |" in out
    assert "| demo-shape | tg64 |" in out


@pytest.mark.usefixtures("wrong")
@pytest.mark.parametrize("form", [[], ["--json"], ["--markdown"]])
def test_a_failure_is_named_and_ends_with_status_1(
    command: Command, capsys: Out, form: list[str]
) -> None:
    assert command("doctor", "--verify", *form) == 1
    out, err = capsys.readouterr()
    assert "logits, float32" in out
    assert "1 of 2 failed: logits, float32" in (err if form else out)


def test_what_cannot_be_measured_fails_and_leaves_the_checks(
    command: Command, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory() -> list[dict[str, Any]]:
        raise RuntimeError("[malloc] Unable to allocate 5 bytes")

    monkeypatch.setattr(run, "measure_speed", no_memory)
    assert command("doctor", "--verify") == 1
    out = capsys.readouterr().out
    assert "Unable to allocate 5 bytes" in out
    assert "own kernel add_norm" in out


@pytest.mark.parametrize(
    ("line", "problem"),
    [("--markdown", "give both"), ("--verify --markdown --json", "leave one out")],
)
def test_forms_that_contradict_are_refused(
    command: Command, capsys: Out, line: str, problem: str
) -> None:
    assert command("doctor", *line.split()) == 1
    assert problem in capsys.readouterr().err
