"""Speeds that users measured: files of one schema, shown beside the prediction."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minicpm_mlx.bench import measured, output
from minicpm_mlx.errors import InvalidArgumentError
from support.source import ROOT

ROW: dict[str, Any] = {
    **{"chip": "Apple M4 Pro", "device": "gpu", "model": "2b-shape", "test": "tg128"},
    **{"type_kv": "full", "n_prompt": 0, "n_gen": 128, "n_depth": 0, "n_parallel": 1},
    **{"avg_ns": 10**9, "stddev_ns": 10**7, "avg_ts": 128.0, "stddev_ts": 1.3},
    **{"memory_bytes": 24 * 2**30, "system": "Darwin 25.1.0 arm64", "mlx": "0.32.4"},
    **{"minicpm_mlx": "0.1.0", "power": "mains", "thermal": "no limit"},
    **{"test_time": "2026-12-01T10:00:00+00:00", "copy": False, "guess": False},
}


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "macs").iterdir()), ids=str)
def test_every_file_that_was_sent_has_the_schema(file: Path) -> None:
    if file.suffix == ".json":
        assert measured.read_macs(file)
    else:
        assert file.name == "README.md"
        named = file.read_text(encoding="utf-8")
        for name in (*measured.TEXTS, *measured.NUMBERS, *output.KEYS, "device"):
            assert f"`{name}`" in named


def test_rows_and_reports_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([ROW]))
    (tmp_path / "report.json").write_text(json.dumps({"passed": True, "bench": [ROW]}))
    assert measured.measured_rows(tmp_path) == [ROW, ROW]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"power": None}, "row 1 lacks power"),
        ({"avg_ts": "fast"}, "row 1 lacks avg_ts"),
        ({"avg_ts": True}, "row 1 lacks avg_ts"),
        ({"chip": "Apple M99"}, "row 1 is of 'Apple M99'"),
        ({"device": "cpu"}, "expected the GPU"),
        ({"model": 5}, "expected what `minicpm-mlx bench --json` prints"),
    ],
)
def test_other_rows_are_refused(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    file = tmp_path / "m4.json"
    file.write_text(json.dumps([ROW | change]))
    with pytest.raises(InvalidArgumentError, match=r"m4\.json") as error:
        measured.read_macs(file)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"bench": []}', '{"bench": 5}', '{"bench": {"a": 1}}', "[5]"]
)
def test_files_without_rows_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "m4.json"
    file.write_text(text)
    with pytest.raises(InvalidArgumentError, match=r"m4\.json"):
        measured.read_macs(file)


def test_the_latest_plain_decoding_counts() -> None:
    changes: list[dict[str, Any]] = [
        {"avg_ts": 140.0, "test_time": "2026-12-02T10:00:00+00:00"},
        {"avg_ts": 120.0},
        {"avg_ts": 999.0, "n_parallel": 8, "test_time": "2026-12-03"},
        {"avg_ts": 999.0, "guess": True, "test_time": "2026-12-03"},
        {"avg_ts": 999.0, "n_depth": 4096, "test_time": "2026-12-03"},
        {"avg_ts": 999.0, "type_kv": "4 bits", "test_time": "2026-12-03"},
        {"avg_ts": 999.0, "model": "1b-shape", "test_time": "2026-12-03"},
    ]
    found = measured.measured_decode([ROW | change for change in changes], ["2b-shape"])
    assert {chip: row["avg_ts"] for chip, row in found.items()} == {"M4 Pro": 140.0}


@pytest.mark.parametrize("model", ["2b-shape", "minicpm-2b-dpo"])
def test_measured_speeds_stand_beside_the_prediction(
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: str,
) -> None:
    assert command("bench", "--predict", "--model", model) == 0
    assert "measured, short" not in capsys.readouterr().out
    (tmp_path / "m4.json").write_text(json.dumps([ROW]))
    monkeypatch.setattr(measured, "FOLDERS", (tmp_path,))
    assert command("bench", "--predict", "--model", model) == 0
    out = capsys.readouterr().out
    assert "measured, short context" in out
    (line,) = [line for line in out.splitlines() if line.startswith("| M4 Pro ")]
    assert line.endswith("| 128 |")
    assert command("bench", "--predict", "--model", model, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["chip"]: row["measured"] for row in rows if row["measured"]} == {"M4 Pro": 128.0}
