"""A run's log: what goes in comes out, and a run that was killed goes on in it."""

from __future__ import annotations

import json
import math
import resource
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpm_mlx.errors import InvalidArgumentError, StorageError
from minicpm_mlx.train.tracking.events import (
    Event,
    Noted,
    Sampled,
    Saved,
    Started,
    Trained,
    Validated,
)
from minicpm_mlx.train.tracking.jsonl_log import KINDS, JsonLog, read_log, to_line
from support.damage import damaged
from support.fake_events import trained

NUMBERS = st.floats()
STEPS = st.integers(0, 1000)
EXTRA = st.dictionaries(st.text(max_size=5), NUMBERS, max_size=2)
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(
        Trained,
        step=STEPS,
        loss=NUMBERS,
        learning_rate=NUMBERS,
        gradient_norm=NUMBERS,
        tokens=STEPS,
        tokens_per_second=NUMBERS,
        epoch=NUMBERS,
        peak_memory=STEPS,
        extra=EXTRA,
    ),
    st.builds(Validated, step=STEPS, loss=NUMBERS, best=st.booleans(), extra=EXTRA),
    st.builds(Saved, step=STEPS, folder=st.text("ab/山\udc80", min_size=1).map(Path)),
    st.builds(Sampled, step=STEPS, prompt=st.text(), reply=st.text()),
    st.builds(Noted, step=STEPS, text=st.text()),
)


def run(path: Path, begin: int, end: int) -> None:
    """Steps `begin` + 1 to `end`, with a checkpoint every other."""
    log = JsonLog(path)
    log(Started(step=begin, steps=10))
    for step in range(begin + 1, end + 1):
        log(trained(step))
        if step % 2 == 0:
            log(Validated(step=step, loss=1.2, best=True))
            log(Saved(step=step, folder=path.parent / f"{step}"))


def steps(path: Path) -> list[tuple[str, int]]:
    return [(type(record.event).__name__, record.event.step) for record in read_log(path)]


def unlike_nan(event: Event) -> str:
    """NaN equals nothing, itself included; as a line of the log it does."""
    return to_line(event, 0)


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(EVENTS, max_size=5))
def test_what_is_logged_is_read_back(events: list[Event]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        log = JsonLog(path)
        before = time.time()
        log(Started(step=0, steps=1000))
        for event in events:
            log(event)
        records = read_log(path)
        assert [unlike_nan(record.event) for record in records[1:]] == list(map(unlike_nan, events))
        assert all(before <= record.time <= time.time() for record in records)
        for line in path.read_bytes().split(b"\n")[:-1]:
            assert json.loads(line, parse_constant=pytest.fail)["event"] in KINDS


def test_chinese_is_written_as_it_is_and_nan_as_null(tmp_path: Path) -> None:
    log = JsonLog(tmp_path / "日志.jsonl")
    log(trained(1, math.nan))
    log(Sampled(step=1, prompt="山东省最高的山？\u2028", reply="泰山。\n"))
    first, second = (tmp_path / "日志.jsonl").read_text(encoding="utf-8").split("\n")[:2]
    assert '"loss": null' in first
    assert "山东省最高的山？" in second


def test_a_resumed_run_goes_on_where_it_was_saved(tmp_path: Path) -> None:
    path, whole = tmp_path / "log.jsonl", tmp_path / "whole.jsonl"
    run(path, 0, 5)
    run(path, 4, 8)
    run(whole, 0, 8)
    assert [step for step in steps(path) if step != ("Started", 4)] == steps(whole)
    assert steps(path)[9:11] == [("Started", 4), ("Trained", 5)]
    assert not list(tmp_path.glob("part-*"))
    run(path, 0, 1)  # from the first step
    assert steps(path) == [("Started", 0), ("Trained", 1)]


def test_a_log_cut_off_anywhere_loses_its_last_line_alone(tmp_path: Path) -> None:
    path, cut = tmp_path / "log.jsonl", tmp_path / "cut.jsonl"
    run(path, 0, 2)
    content, whole = path.read_bytes(), steps(path)
    for length in range(len(content)):
        cut.write_bytes(content[:length])
        complete = content[:length].count(b"\n")
        found = steps(cut)
        assert found[:complete] == whole[:complete]
        assert len(found) - complete == (content[length : length + 1] == b"\n" and length > 0)
    run(cut, 1, 2)
    assert steps(cut) == [("Started", 0), ("Trained", 1), ("Started", 1), *whole[2:]]


LINES = "\n".join(
    to_line(event, 1700000000.0)
    for event in (
        Started(step=0, steps=10),
        trained(1),
        Validated(step=1, loss=2.0, best=False, extra={"accuracy": 0.5}),
        Saved(step=1, folder=Path("a")),
        Noted(step=1, text="山"),
    )
)


@damaged(LINES.encode(), examples=300)
def test_a_damaged_log_is_refused_or_read(content: bytes) -> None:
    with TemporaryDirectory() as folder, suppress(InvalidArgumentError):
        path = Path(folder) / "log.jsonl"
        path.write_bytes(content)
        for record in read_log(path):
            unlike_nan(record.event)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("hello", "not JSON at character 1"),
        ("[]", "expected an object whose event is one of started, trained"),
        ('{"event": ["trained"]}', "expected an object whose event"),
        ('{"event": "baked", "step": 1}', "expected an object whose event"),
        ('{"event": "noted", "step": 1}', "expected a field text"),
        ('{"event": "noted", "step": 1.0, "text": "", "time": 1}', "expected a field step"),
        ('{"event": "noted", "step": true, "text": "", "time": 1}', "expected a field step"),
        ('{"event": "noted", "step": 1, "text": "", "time": 1e999}', "expected a field time"),
        ('{"event": "noted", "step": 1, "text": "", "time": NaN}', "no NaN"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_what_is_no_log_is_named_with_its_line_and_kept(
    line: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "log.jsonl"
    content = f"{to_line(Started(step=0, steps=1))}\n{line}\n"
    path.write_text(content)
    with pytest.raises(InvalidArgumentError, match=rf"log\.jsonl, line 2: not an event.*{reason}"):
        JsonLog(path)
    assert path.read_text() == content


def test_a_log_needs_a_folder_and_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="no folder for a log"):
        JsonLog(tmp_path / "none" / "log.jsonl")
    with pytest.raises(InvalidArgumentError, match="expected a file"):
        JsonLog(tmp_path)
    with pytest.raises(InvalidArgumentError, match="expected a file"):
        JsonLog(Path("/dev/zero"))
    with pytest.raises(InvalidArgumentError, match="No such file"):
        read_log(tmp_path / "log.jsonl")


def test_a_full_disk_is_told_and_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    run(path, 0, 5)
    content, log = path.read_bytes(), JsonLog(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, hard))
    try:
        with pytest.raises(StorageError, match=r"log\.jsonl: cannot be written .*; give another"):
            log(Started(step=4, steps=10))
        with pytest.raises(StorageError, match="cannot be written"):
            log(trained(6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]
