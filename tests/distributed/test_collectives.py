"""Ranks that compute together, as real processes of this machine by MLX's ring."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from minicpm_mlx.distributed import collectives
from minicpm_mlx.distributed.launcher import run_python
from minicpm_mlx.errors import DistributedError

HEAD = """
import os, signal, sys, time
import mlx.core as mx
from minicpm_mlx.distributed import collectives as distributed
from minicpm_mlx.errors import MiniCPMError
rank = distributed.rank()
if rank:
    sys.stdout = open(os.devnull, "w")
try:
    {0}
except MiniCPMError as error:
    sys.exit("minicpm-mlx: " + str(error))
"""

Launched = Callable[..., tuple[int, str, str]]


@pytest.fixture
def launched(capfd: pytest.CaptureFixture[str]) -> Launched:
    """Runs these lines on so many ranks: exit status, output, errors."""

    def run(ranks: int, lines: str, port: int | None = None) -> tuple[int, str, str]:
        script = HEAD.format(lines.strip().replace("\n", "\n    "))
        status = run_python(["-c", script], ranks, starting_port=port)
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables, and an error where MLX is asked to connect."""
    for name in collectives.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mx.distributed, "init", lambda *_, **__: pytest.fail("connected"))


# Together


def test_ranks_agree_on_sums_and_what_the_first_says(launched: Launched) -> None:
    ranks = 3
    lines = """
import json
values = mx.array([[float(rank), 10.0], [0.5, rank * 2.0]])
tree = {"a": [values, mx.array(rank)], "b": {"half": mx.full((3,), rank, mx.bfloat16)}}
sums = distributed.sum_of(tree)
distributed.same_everywhere("the same data", "data")
said = [distributed.broadcast(text if rank == 0 else b"other") for text in (b"hello", b"")]
assert said == [b"hello", b""], said
distributed.barrier()
found = {
    "size": distributed.size(),
    "sum": sums["a"][0].tolist(),
    "whole": [sums["a"][1].item(), str(sums["a"][1].dtype)],
    "half": [sums["b"]["half"].tolist(), str(sums["b"]["half"].dtype)],
}
distributed.same_everywhere(json.dumps(found), "result")
print(json.dumps(found))
"""
    status, out, err = launched(ranks, lines)
    assert (status, err) == (0, "")
    total = sum(range(ranks))
    assert json.loads(out) == {
        "size": ranks,
        "sum": [[total, 10.0 * ranks], [0.5 * ranks, total * 2.0]],
        "whole": [total, "mlx.core.int32"],
        "half": [[total] * 3, "mlx.core.bfloat16"],
    }


def test_a_rank_with_other_data_is_named_once_by_all(launched: Launched) -> None:
    lines = 'distributed.same_everywhere("abc" if rank < 2 else "abd", "training data")'
    status, out, err = launched(3, lines)
    assert (status, out) == (1, "")
    assert err == (
        "minicpm-mlx: expected the same training data on every rank, got another on rank 2 "
        "than on rank 0; give all of them the same\n"
    )


KILLED = "minicpm-mlx: rank 1 was ended by SIGKILL; the launch ended with it\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "expected"),
    [("os.kill(os.getpid(), signal.SIGKILL)", (137, "", KILLED)), ("os._exit(4)", (4, "", ""))],
)
def test_a_rank_that_vanishes_in_a_meeting_ends_the_launch(
    launched: Launched, end: str, expected: tuple[int, str, str]
) -> None:
    lines = f"""
distributed.barrier()
if rank == 1:
    {end}
while True:
    distributed.barrier()
"""
    before = time.monotonic()
    assert launched(3, lines) == expected
    assert time.monotonic() - before < 10


@pytest.mark.slow
def test_two_launches_at_once_do_not_meet(launched: Launched) -> None:
    """One from within each rank of another: they inherit that other's ports."""
    script = "from minicpm_mlx.distributed import collectives as d; import mlx.core as mx; "
    script += "total = d.sum_of(mx.array(d.rank() + 10)).item(); d.rank() or print(total)"
    inner = "import sys; from minicpm_mlx.distributed.launcher import run_python; "
    inner += f"sys.exit(run_python(['-c', {script!r}], 2))"
    lines = f"""
import subprocess
own = distributed.sum_of(mx.array(rank)).item()
done = subprocess.run([sys.executable, "-c", {inner!r}], capture_output=True, text=True)
print(own, done.stdout.strip(), done.stderr.strip(), distributed.sum_of(mx.array(1)).item())
"""
    assert launched(2, lines) == (0, "1 21  2\n", "")


def test_a_port_in_use_is_an_error_of_one_line(launched: Launched) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        status, _, err = launched(2, "distributed.barrier()", port=taken.getsockname()[1])
    assert status == 1
    assert err.startswith("minicpm-mlx: rank 0 could not connect by the ring backend (")
    assert err.endswith("its port is in use: give launch another --starting-port\n")
    assert err.count("\n") == 1


def test_the_loss_of_a_rank_is_a_named_error_without_our_launcher_too(tmp_path: Path) -> None:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in (first, second)]
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    lines = "distributed.barrier()\n    rank and os._exit(0)\n    distributed.barrier()"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HEAD.format(lines)],
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=30)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 0]
    assert errors[0].splitlines()[-1].startswith("minicpm-mlx: rank 0 lost the others (")


# Alone


@pytest.mark.usefixtures("alone")
def test_alone_everything_is_given_back_and_nothing_connects() -> None:
    tree = {"a": mx.array([1.0])}
    assert (collectives.size(), collectives.rank(), collectives.group()) == (1, 0, None)
    assert collectives.sum_of(tree) is tree
    assert collectives.broadcast(b"words") == b"words"
    collectives.barrier()
    collectives.same_everywhere("anything", "data")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("text", ["", '[["127.0.0.1:5000"]]'])
def test_a_hostfile_of_one_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """As mlx.launch leaves it for one process."""
    (tmp_path / "hosts").write_text(text)
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    monkeypatch.setenv("MLX_RANK", "0")
    assert collectives.group() is None


@pytest.mark.usefixtures("alone")
def test_mpirun_with_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert collectives.group() is None


@pytest.mark.usefixtures("alone")
def test_other_launchers_variables_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    assert (collectives.rank(), collectives.size()) == (3, 4)
    (tmp_path / "devices").write_text('[[null, "a"], ["b", null]]')
    monkeypatch.setenv("MLX_JACCL_COORDINATOR", "10.0.0.1:32323")
    monkeypatch.setenv("MLX_IBV_DEVICES", str(tmp_path / "devices"))
    monkeypatch.setenv("MLX_RANK", "1")
    assert (collectives.rank(), collectives.size()) == (1, 2)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("text", [None, "{", "7"])
def test_a_hostfile_that_cannot_be_read_is_a_named_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    with pytest.raises(DistributedError, match="ring backend, but without its hosts"):
        collectives.group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("given", [None, "", "2", "-1", "one"])
def test_a_rank_out_of_range_is_a_named_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    (tmp_path / "hosts").write_text('[["127.0.0.1:5000"], ["127.0.0.1:5001"]]')
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    monkeypatch.delenv("MLX_RANK", raising=False)
    if given is not None:
        monkeypatch.setenv("MLX_RANK", given)
    with pytest.raises(DistributedError, match="MLX_RANK must be a rank from 0 to 1"):
        collectives.rank()
