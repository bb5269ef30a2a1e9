"""What trackers are told of a run, each writing its own files on this disk, without a login."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minicpm_mlx.errors import InvalidArgumentError, MissingPackageError
from minicpm_mlx.train.tracking import trackers
from minicpm_mlx.train.tracking.events import Event, Noted, Saved, Started, Validated
from minicpm_mlx.train.tracking.trackers import PACKAGES, metrics, tracker
from support.fake_events import trained

CONFIG = {"model": "山东", "data": Path("a/b"), "rank": 8, "layers": [1, 2], "resume": None}


@pytest.fixture(autouse=True)
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is logged in to anything, whoever runs this."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "SWANLAB_API_KEY", "SWANLAB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)


def events(begin: int = 0) -> Iterator[Event]:
    yield Started(step=begin, steps=4)
    for step in range(begin + 1, 5):
        loss = math.nan if step == 3 else 4.0 / step
        yield trained(step, loss, extra={"margin": 0.25})
    yield Validated(step=4, loss=1.25, best=True, extra={"accuracy": 0.75})
    yield Saved(step=4, folder=Path("4"))


def test_numbers_have_the_usual_names() -> None:
    _, first, *_, validated, saved = events()
    assert metrics(first) == {
        "train/loss": 4.0,
        "train/learning_rate": 1e-4,
        "train/gradient_norm": 0.5,
        "train/tokens": 100.0,
        "train/tokens_per_second": 312.0,
        "train/epoch": 0.1,
        "train/peak_memory_gb": 2.5,
        "train/margin": 0.25,
    }
    assert metrics(validated) == {"valid/loss": 1.25, "valid/accuracy": 0.75}
    assert metrics(saved) == metrics(Noted(step=1, text="")) == {}
    assert "train/loss" not in metrics(list(events())[3])  # NaN


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="one of tensorboard, wandb, swanlab, got 'a'"):
        tracker("a", "run", {}, tmp_path)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(MissingPackageError, match=f"{name} needs .*: pip install {PACKAGES[name]}"):
        tracker(name, "run", {}, tmp_path)


def track(name: str, folder: Path, begin: int = 0) -> None:
    listener = tracker(name, "第一次", CONFIG, folder)
    for event in events(begin):
        listener(event)
    listener.close()
    listener.close()


def tensorboard_events(path: Path) -> Iterator[Any]:
    """The records of an event file: length, checksum, bytes, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
        at += 16 + length


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    folder = tmp_path / "runs" / "山"
    track("tensorboard", folder)
    (path,) = folder.iterdir()
    assert path.name.startswith("events.out.tfevents.")
    found: dict[str, list[tuple[int, float]]] = {}
    texts = b""
    for event in tensorboard_events(path):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            else:
                texts += b"".join(value.tensor.string_val)
    assert found["train/loss"] == [(1, 4.0), (2, 2.0), (4, 1.0)]
    assert found["valid/loss"] == [(4, 1.25)]
    assert found["valid/accuracy"] == [(4, 0.75)]
    assert set(found) == {*metrics(list(events())[1]), "valid/loss", "valid/accuracy"}
    for word in ("第一次", "山东", "a/b"):
        assert word in texts.decode()


def test_tensorboard_forgets_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    track("tensorboard", tmp_path / "a", begin=2)
    (path,) = (tmp_path / "a").iterdir()
    begun = [event.step for event in tensorboard_events(path) if event.HasField("session_log")]
    assert begun == [3]


def test_wandb_keeps_the_run_here_without_a_login(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="needs wandb")
    track("wandb", tmp_path / "w")
    (kept,) = (tmp_path / "w" / "wandb").glob("offline-run-*/*.wandb")
    content = kept.read_bytes()
    for word in ("第一次", "train/loss", "valid/accuracy", "train/margin", "rank"):
        assert word.encode() in content
    assert capfd.readouterr() == ("", "")


def test_wandb_uploads_only_where_there_is_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not trackers._wandb_login()
    (tmp_path / ".netrc").write_text("machine example.org login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert not trackers._wandb_login()
    monkeypatch.setenv("WANDB_BASE_URL", "https://example.org:8080/x")
    assert trackers._wandb_login()
    (tmp_path / ".netrc").write_text("gibberish\n")
    assert not trackers._wandb_login()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert trackers._wandb_login()


def test_swanlab_keeps_the_run_here_without_a_login(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("swanlab", reason="needs swanlab")
    track("swanlab", tmp_path / "s")
    (run,) = (tmp_path / "s").glob("run-*")
    (kept,) = run.glob("*.swanlab")
    for word in ("train/loss", "valid/accuracy", "train/margin"):
        assert word.encode() in kept.read_bytes()
    assert "rank" in (run / "files" / "config.yaml").read_text(encoding="utf-8")
    assert capfd.readouterr().out == ""
