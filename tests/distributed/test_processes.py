"""Processes of one launch, as shell scripts: their streams, and how they end."""

from __future__ import annotations

import os
import pty
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm_mlx.distributed import processes
from minicpm_mlx.distributed.stderr import NOISE, StderrMux
from support.processes import expect_end

Capture = pytest.CaptureFixture[str]
LONG = "sleep 60"


def run(*commands: str) -> int:
    """Exit status of a launch that does not take long."""
    before = time.monotonic()
    status = processes.run(commands, os.environ)
    assert time.monotonic() - before < 8
    return status


# Streams


def test_only_rank_0_prints_and_lines_of_others_name_their_rank(capfd: Capture) -> None:
    assert run("echo out; echo error >&2", "echo out; echo one >&2", "printf two >&2") == 0
    out, err = capfd.readouterr()
    assert out == "out\n"
    assert sorted(err.splitlines()) == ["[rank 1] one", "[rank 1] out", "[rank 2] two", "error"]


def test_a_message_of_all_ranks_is_shown_once(capfd: Capture) -> None:
    failure = "echo no such model >&2; exit 1"
    assert run(failure, f"sleep 0.2; {failure}", f"sleep 0.2; {failure}") == 1
    assert capfd.readouterr().err == "no such model\n"


def test_lines_that_one_rank_repeats_are_all_shown(capfd: Capture) -> None:
    assert run("true", "printf 'Traceback\\n  line\\n  line\\n' >&2") == 0
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["[rank 1] Traceback", "[rank 1]   line", "[rank 1]   line"]


def test_noise_of_a_lost_connection_is_dropped(capfd: Capture) -> None:
    script = "printf '[ri' >&2; sleep 0.1; printf 'ng] Socket 5 was closed\\nlost\\n' >&2"
    assert run(script, "printf '[ring] Socket 5 was closed\\n' >&2") == 0
    assert capfd.readouterr().err == "lost\n"


@contextmanager
def stderr_to(descriptor: int) -> Iterator[None]:
    before = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(descriptor)


def test_rank_0_writes_to_a_terminal_where_there_is_one() -> None:
    reader, writer = pty.openpty()
    with stderr_to(writer):
        assert run("test -t 2 && echo yes >&2", "test -t 2 || echo no >&2") == 0
        output = b""
        while output.count(b"\n") < 2:
            output += os.read(reader, 1000)
    assert output == b"yes\r\n[rank 1] no\r\n"
    os.close(reader)


@given(st.lists(st.binary(min_size=1, max_size=12), max_size=8))
def test_bytes_of_rank_0_come_out_as_they_were(chunks: list[bytes]) -> None:
    if NOISE in b"".join(chunks):
        return
    source, sink = os.pipe()
    reader, writer = os.pipe()
    with stderr_to(writer):
        mux = StderrMux([source])
        for chunk in chunks:
            os.write(sink, chunk)
            mux.relay(0)
        os.close(sink)
        mux.relay(0)
    with os.fdopen(reader, "rb") as file:
        assert file.read() == b"".join(chunks)


# Ends


@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_fails_ends_the_others_with_its_status(failing: int, capfd: Capture) -> None:
    commands = [LONG, LONG, LONG]
    commands[failing] = "exit 7"
    assert run(*commands) == 7
    assert capfd.readouterr().err == ""


def test_a_rank_that_is_killed_ends_the_others_and_is_named(capfd: Capture) -> None:
    assert run(LONG, "kill -KILL $$") == 137
    expected = "minicpm-mlx: rank 1 was ended by SIGKILL; the launch ended with it\n"
    assert capfd.readouterr().err == expected


def test_what_a_rank_started_ends_with_it(tmp_path: Path) -> None:
    assert run("sleep 0.3", f"{LONG} & echo $! >{tmp_path}/child; exit 0") == 0
    expect_end(int((tmp_path / "child").read_text()))


def send_when(ready: Path, ranks: int, number: int, times: int = 1) -> None:
    """Sends this process a signal, so many times, once `ranks` files are in a folder."""

    def send() -> None:
        while len(list(ready.iterdir())) < ranks:
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.3)

    threading.Thread(target=send).start()


@pytest.mark.parametrize(
    ("number", "code", "status"),
    [
        (signal.SIGINT, 130, 130),
        (signal.SIGTERM, 1, 143),
        (signal.SIGHUP, 1, 129),
        (signal.SIGTERM, 0, 0),
    ],
)
def test_a_signal_reaches_every_rank(
    number: signal.Signals, code: int, status: int, tmp_path: Path, capfd: Capture
) -> None:
    """A launch whose ranks then end well has ended well."""
    ready, done = tmp_path / "ready", tmp_path / "done"
    ready.mkdir()
    done.mkdir()
    trap = f"trap 'touch {done}/$$; exit {code}' {int(number)}; touch {ready}/$$; {LONG} & wait"
    handler = signal.getsignal(number)
    send_when(ready, 3, number)
    assert run(trap, trap, trap) == status
    assert signal.getsignal(number) == handler
    assert len(list(done.iterdir())) == 3
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("patience", "times"), [(0.3, 1), (60.0, 2)])
def test_a_rank_that_does_not_end_is_killed_in_the_end_or_at_a_second_signal(
    patience: float, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PATIENCE", patience)
    deaf = f"trap '' INT TERM; touch {tmp_path}/$$; while :; do sleep 0.1; done"
    send_when(tmp_path, 2, signal.SIGINT, times)
    assert run(deaf, deaf) == 130
