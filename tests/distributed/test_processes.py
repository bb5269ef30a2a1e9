"""Processes of one launch: what is heard of them, and that they end together."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm_mlx.distributed import processes
from minicpm_mlx.distributed.stderr import Voices

LAUNCHER = """
import json, os, sys
from minicpm_mlx.distributed import processes as ranks
ranks.PATIENCE = float(os.environ.get("PATIENCE", ranks.PATIENCE))
starts = [ranks.Start([sys.executable, "-c", script], os.environ) for script in sys.argv[1:]]
ended = ranks.run(starts)
print("ended", ended.status, dict(ended.killed), file=sys.stderr)
sys.exit(ended.status)
"""
SAY = "import sys; print('out of {0}'); print('error of {0}', file=sys.stderr)"


def launcher(*scripts: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *scripts],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def launched(*scripts: str, stdin: str = "", **environment: str) -> tuple[int, str, list[str]]:
    """Status, standard output and lines of standard error, of a launch of these scripts."""
    process = launcher(*scripts, **environment)
    out, err = process.communicate(stdin, timeout=30)
    return process.returncode, out, err.splitlines()


def alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return bool(state.stdout.strip()) and not state.stdout.startswith("Z")


def sleeper(folder: Path, rank: int, then: str = "time.sleep(60)") -> str:
    """A script that notes its process in `folder`, and goes on for long."""
    return (
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        f"part = Path({str(folder)!r}) / '{rank}.part'\n"
        f"part.write_text(str(os.getpid()))\n"
        f"part.rename(part.with_suffix('.pid'))\n{then}\n"
    )


def pids(folder: Path, count: int) -> list[int]:
    """The processes of so many ranks, once all are under way."""
    for _ in range(400):
        files = [folder / f"{rank}.pid" for rank in range(count)]
        if all(file.exists() for file in files):
            return [int(file.read_text()) for file in files]
        time.sleep(0.05)
    raise AssertionError("the ranks did not start")


@contextmanager
def under_way(
    folder: Path, *scripts: str, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A launch, and its ranks' processes: none of which is there afterwards."""
    process = launcher(*scripts, **environment)
    found: list[int] = []
    try:
        found = pids(folder, len(scripts))
        yield process, found
        deadline = time.monotonic() + 5
        while any(map(alive, found)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [pid for pid in found if alive(pid)]
    finally:
        process.kill()
        process.communicate()
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# What is heard


def test_only_the_first_rank_prints_and_errors_of_others_name_their_rank() -> None:
    status, out, err = launched(*(SAY.format(rank) for rank in range(3)))
    assert (status, out) == (0, "out of 0\n")
    assert sorted(err) == [
        "[rank 1] error of 1",
        "[rank 2] error of 2",
        "ended 0 {}",
        "error of 0",
    ]


def test_what_every_rank_says_is_shown_once() -> None:
    """Also where rank 0 is the last to say it."""
    script = "import sys, time; time.sleep({}); sys.exit('no such model')"
    status, _, err = launched(script.format(0.3), script.format(0), script.format(0))
    assert (status, err) == (1, ["no such model", "ended 1 {}"])


def test_what_one_rank_says_twice_is_shown_twice_and_as_it_is() -> None:
    script = "import sys; print('Traceback\\n  line\\n  line', file=sys.stderr)"
    expected = ["[rank 1] Traceback", "[rank 1]   line", "[rank 1]   line", "ended 0 {}"]
    assert launched("", script)[2] == expected


def test_noise_of_a_lost_connection_is_dropped_unless_asked_for() -> None:
    script = "import sys; print('[ring] Socket 5 was closed\\nlost', file=sys.stderr)"
    assert launched(script, script)[2] == ["lost", "ended 0 {}"]
    heard = launched(script, script, MLX_RING_VERBOSE="1")[2]
    assert heard == ["[ring] Socket 5 was closed", "lost", "ended 0 {}"]


def test_standard_input_is_rank_zeros() -> None:
    script = "import sys; print(sys.stdin.read().upper(), end='')"
    other = "import sys; assert sys.stdin.read() == ''"
    assert launched(script, other, stdin="words") == (0, "WORDS", ["ended 0 {}"])


def test_rank_zero_writes_to_a_terminal_where_there_is_one() -> None:
    ours, theirs = pty.openpty()
    script = "import sys; print(sys.stderr.isatty(), file=sys.stderr)"
    command = [sys.executable, "-c", LAUNCHER, script, script]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        heard = b""
        with suppress(OSError):
            while data := os.read(ours, 1000):
                heard += data
    os.close(ours)
    assert process.returncode == 0
    assert heard.split() == b"True [rank 1] False ended 0 {}".split()


@given(st.lists(st.binary(min_size=1, max_size=12), max_size=8))
def test_bytes_of_rank_zero_come_out_as_they_were(chunks: list[bytes]) -> None:
    if b"[ring] " in b"".join(chunks):
        return
    source, sink = os.pipe()
    reading, writing = os.pipe()
    before = os.dup(2)
    os.dup2(writing, 2)
    try:
        voices = Voices([source])
        for chunk in chunks:
            os.write(sink, chunk)
            voices.relay(0)
        os.close(sink)
        voices.finish()
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(writing)
    with os.fdopen(reading, "rb") as file:
        assert file.read() == b"".join(chunks)


# How they end


def test_one_process_is_a_launch_too() -> None:
    assert launched(SAY.format(0)) == (0, "out of 0\n", ["error of 0", "ended 0 {}"])


@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_fails_ends_the_others_with_its_status(tmp_path: Path, failing: int) -> None:
    scripts = [sleeper(tmp_path, rank) for rank in range(3)]
    # The one that fails waits until all are there, so that there is something to end.
    scripts[failing] = sleeper(
        tmp_path,
        failing,
        f"while len(list(Path({str(tmp_path)!r}).glob('*.pid'))) < 3: time.sleep(0.01)\n"
        "sys.exit(7)",
    )
    with under_way(tmp_path, *scripts) as (process, _):
        assert process.wait(timeout=10) == 7
        assert process.stderr.read() == "ended 7 {}\n"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_and_is_named(tmp_path: Path, victim: int) -> None:
    with under_way(tmp_path, *(sleeper(tmp_path, rank) for rank in range(2))) as (process, found):
        os.kill(found[victim], signal.SIGKILL)
        assert process.wait(timeout=10) == 137
        assert process.stderr.read() == f"ended 137 {{{victim}: 'SIGKILL'}}\n"


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_reaches_every_rank(tmp_path: Path, number: signal.Signals, status: int) -> None:
    then = (
        f"signal.signal({number.value}, lambda *_: (part.with_suffix('.got').touch(),"
        f" os._exit({status})))\npart.with_suffix('.ready').touch()\ntime.sleep(60)"
    )
    scripts = [sleeper(tmp_path, rank, then) for rank in range(3)]
    with under_way(tmp_path, *scripts) as (process, _):
        while len(list(tmp_path.glob("*.ready"))) < 3:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(timeout=10) == status
        assert len(list(tmp_path.glob("*.got"))) == 3
        assert process.stderr.read() == f"ended {status} {{}}\n"


DEAF = (
    "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
    "part.with_suffix('.ready').touch()\ntime.sleep(60)"
)


def test_a_rank_that_will_not_end_is_killed_after_a_while(tmp_path: Path) -> None:
    scripts = [sleeper(tmp_path, rank, DEAF) for rank in range(2)]
    with under_way(tmp_path, *scripts, PATIENCE="0.5") as (process, _):
        while len(list(tmp_path.glob("*.ready"))) < 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 143


def test_a_second_interrupt_kills_at_once(tmp_path: Path) -> None:
    scripts = [sleeper(tmp_path, rank, DEAF) for rank in range(2)]
    with under_way(tmp_path, *scripts) as (process, _):
        while len(list(tmp_path.glob("*.ready"))) < 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == 130


def test_what_a_rank_started_ends_with_it(tmp_path: Path) -> None:
    child = (
        "import subprocess\n"
        "started = subprocess.Popen(['sleep', '60'])\n"
        f"(Path({str(tmp_path)!r}) / 'child').write_text(str(started.pid))\n"
        "part.with_suffix('.ready').touch()\ntime.sleep(60)"
    )
    with under_way(tmp_path, sleeper(tmp_path, 0), sleeper(tmp_path, 1, child)) as (process, found):
        while not (tmp_path / "1.ready").exists():
            time.sleep(0.02)
        os.kill(found[1], signal.SIGKILL)
        process.wait(timeout=10)
        assert not alive(int((tmp_path / "child").read_text()))


def test_ranks_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    follow = (
        "from minicpm_mlx.distributed.processes import end_with_the_launcher\n"
        "end_with_the_launcher()\n"
        "part.with_suffix('.ready').touch()\ntime.sleep(60)"
    )
    scripts = [sleeper(tmp_path, rank, follow) for rank in range(2)]
    with under_way(tmp_path, *scripts, **{processes.LAUNCHED: "1"}) as (process, _):
        while len(list(tmp_path.glob("*.ready"))) < 2:
            time.sleep(0.02)
        process.kill()


def test_a_program_that_is_not_there_leaves_no_other_rank(tmp_path: Path) -> None:
    start = processes.Start([sys.executable, "-c", sleeper(tmp_path, 0)], os.environ)
    absent = processes.Start([str(tmp_path / "absent")], os.environ)
    before = time.monotonic()
    with pytest.raises(FileNotFoundError, match="absent"):
        processes.run([start, absent])
    assert time.monotonic() - before < 5
    assert not [pid for file in tmp_path.glob("*.pid") if alive(pid := int(file.read_text()))]


def test_descriptors_and_handlers_are_as_before(tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    lowest = os.dup(0)
    os.close(lowest)
    quiet = processes.Start([sys.executable, "-c", ""], os.environ)
    for _ in range(3):
        assert processes.run([quiet, quiet]) == processes.Ended(0)
    with pytest.raises(FileNotFoundError):
        processes.run([quiet, quiet, processes.Start([str(tmp_path / "absent")], os.environ)])
    again = os.dup(0)
    os.close(again)
    assert again == lowest
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
