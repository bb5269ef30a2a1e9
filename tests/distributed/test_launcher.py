"""`minicpm-mlx launch`: what it refuses, what each rank is started with, and whole runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minicpm_mlx.distributed import launcher
from minicpm_mlx.distributed.launcher import run_python
from minicpm_mlx.errors import InvalidArgumentError
from support.processes import expect_end
from support.tiny_model import write_model

COMMAND = [sys.executable, "-c", "from minicpm_mlx.cli.main import main; main()"]
SHORT = ("generate", "--model", "demo", "--max-tokens", "4", "-p", "Once upon")
REPORT = """
import json, os, sys
names = ("MLX_RANK", "MLX_JACCL_COORDINATOR", "MLX_JACCL_RING", "OPENBLAS_NUM_THREADS", "EXTRA")
found = {name: os.environ[name] for name in names if name in os.environ}
for name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES"):
    if name in os.environ:
        found[name] = json.loads(open(os.environ[name]).read())
print(json.dumps(found), file=sys.stderr)
"""
"""A rank's script, which prints what it was started with."""

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""MLX leaves hostfiles open that it has read."""

# Refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "2"], "launch needs a command to run: one of dpo, generate, lora, serve"),
        (["--", *SHORT], "launch needs -n or --hostfile, and takes one of them alone"),
        (["-n", "2", "--hostfile", __file__, "--", *SHORT], "takes one of them alone"),
        (["-n", "0", "--", *SHORT], "-n must be 1 or more, got 0"),
        (["-n", "2", "--", "chat"], "one of dpo, generate, lora, serve; got 'chat'"),
        (["-n", "2", "launch", "-n", "2", *SHORT], "got 'launch'"),
        (["-n", "2", "--backend", "tcp", *SHORT], "mlx.launch: The backend should be one of"),
        (["-n", "2", "--backend", "jaccl", *SHORT], "number of RDMA devices does not match hosts"),
        (["--hostfile", "absent.json", *SHORT], "--hostfile absent.json: No such file"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str],
    message: str,
    command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command("launch", *arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("minicpm-mlx: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    ["", "7", "[]", "{}", "[7]", '[{"ips": []}]', '[{"ssh": "mac2"}]', '{"hosts": [], "envs": 3}'],
)
def test_a_malformed_hostfile_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "hosts.json").write_text(text)
    with pytest.raises(InvalidArgumentError, match=r"^mlx.launch: "):
        run_python([], hostfile=tmp_path / "hosts.json")


def test_mpi_needs_mpirun(monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda _, **options: run(["false"], **options))
    with pytest.raises(InvalidArgumentError, match=r"mlx.launch: Command"):
        run_python([], 2, backend="mpi")


# What ranks are started with


@pytest.fixture
def reports(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """Reports of the ranks of a launch, in order."""
    for name in launcher.THREADS:
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        assert run_python(["-c", REPORT], *arguments, **options) == 0
        lines = [line.partition("] ")[2] or line for line in capfd.readouterr().err.splitlines()]
        return sorted(map(json.loads, lines), key=lambda report: report["MLX_RANK"])

    return run


def test_each_rank_has_a_port_of_its_own_and_a_share_of_the_cores(
    reports: Callable[..., list], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.sys, "platform", "darwin")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    found = reports(3)
    assert [report["MLX_RANK"] for report in found] == ["0", "1", "2"]
    assert {report["OPENBLAS_NUM_THREADS"] for report in found} == {"2"}
    assert found[0]["MLX_HOSTFILE"] == found[1]["MLX_HOSTFILE"] == found[2]["MLX_HOSTFILE"]
    addresses = {address for [address] in found[0]["MLX_HOSTFILE"]}
    assert len(addresses) == 3
    assert all(address.startswith("127.0.0.1:") for address in addresses)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "5")
    first, _ = reports(2, starting_port=4000)
    listen = [["127.0.0.1:4000"], ["127.0.0.1:4001"]]
    assert first == {"MLX_RANK": "0", "MLX_HOSTFILE": listen, "OPENBLAS_NUM_THREADS": "5"}


def hostfile(folder: Path, *hosts: dict[str, Any], **options: Any) -> Path:
    path = folder / "hosts.json"
    path.write_text(json.dumps({"hosts": hosts, **options}))
    return path


def test_a_hostfile_gives_backend_variables_and_devices(
    reports: Callable[..., list], tmp_path: Path
) -> None:
    first = {"ssh": "127.0.0.1", "ips": ["10.0.0.1"], "rdma": [None, "rdma_en2"]}
    second = {"ssh": "127.0.0.1", "ips": ["10.0.0.2"], "rdma": ["rdma_en3", None]}
    path = hostfile(tmp_path, first, second, backend="jaccl-ring", envs=["EXTRA=it's"])
    assert reports(hostfile=path, starting_port=4000)[1] == {
        "MLX_RANK": "1",
        "EXTRA": "it's",
        "MLX_JACCL_COORDINATOR": "10.0.0.1:4000",
        "MLX_JACCL_RING": "1",
        "MLX_IBV_DEVICES": [[None, "rdma_en2"], ["rdma_en3", None]],
    }


def stand_in(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a program of this name on the path."""
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_another_machine_is_reached_over_ssh(
    reports: Callable[..., list], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stand-in for ssh runs its command here, with nothing inherited."""
    script = 'exec env -i PATH=/usr/bin:/bin bash -c "stty() { :; }; ${@: -1}"'
    stand_in(tmp_path, "ssh", f'echo "$@" >>{tmp_path}/log\n{script}', monkeypatch)
    hosts = {"ssh": "127.0.0.1", "ips": ["10.0.0.1"]}, {"ssh": "mac2", "ips": ["10.0.0.2"]}
    path = hostfile(tmp_path, *hosts)
    found = reports(hostfile=path)
    listen = [["10.0.0.1:32323"], ["10.0.0.2:32324"]]
    assert found == [{"MLX_RANK": rank, "MLX_HOSTFILE": listen} for rank in "01"]
    assert (tmp_path / "log").read_text().startswith("-tt -o LogLevel=QUIET mac2 ")
    stand_in(tmp_path, "other-python", "exit 3", monkeypatch)
    assert run_python(["-c", "pass"], hostfile=path, python=str(tmp_path / "other-python")) == 3


def test_the_status_of_mpirun_is_the_launchs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for mpirun runs one rank."""
    script = 'while [ "$1" != -- ]; do shift; done; shift; OMPI_COMM_WORLD_RANK=0 exec "$@"'
    stand_in(tmp_path, "mpirun", script, monkeypatch)
    assert run_python(["-c", "print('out'); raise SystemExit(5)"], 2, backend="mpi") == 5
    assert capfd.readouterr() == ("out\n", "")


# Whole runs


def test_only_rank_0_reads_input_and_prints(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import sys; from minicpm_mlx.cli import main as cli; "
    program += "cli.main = lambda: print(sys.stdin.read() or 'nothing'); cli.as_rank()"
    before = os.dup(0)
    reader, writer = os.pipe()
    os.write(writer, b"text")
    os.close(writer)
    os.dup2(reader, 0)
    assert run_python(["-c", program], 2) == 0
    os.dup2(before, 0)
    assert capfd.readouterr() == ("text\n", "")


def test_a_mistake_that_all_make_is_said_once(
    command: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "-m", "no-such", "-p", "a"]
    assert command(*arguments) == 1
    expected = capfd.readouterr()
    assert command("launch", "-n", "2", "--", *arguments) == 1
    assert capfd.readouterr() == expected
    assert command("generate", "--seed", "word") == 2
    expected = capfd.readouterr()
    assert command("launch", "-n", "2", "--", "generate", "--seed", "word") == 2
    assert capfd.readouterr() == expected


def test_nothing_is_imported_from_the_folder_it_is_called_in(tmp_path: Path) -> None:
    for name in ("json", "minicpm_mlx", "signal", "typer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    code = f"import sys; sys.path.remove(''); {COMMAND[2]}"
    line = [sys.executable, "-c", code, "launch", "-n", "2", "generate", "--help"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: minicpm-mlx generate" in done.stdout


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [(signal.SIGINT, 130, "minicpm-mlx: interrupted\n"), (signal.SIGKILL, -9, "")],
)
def test_a_launch_that_ends_leaves_no_rank(
    tmp_path: Path, number: signal.Signals, status: int, message: str
) -> None:
    model = str(write_model(tmp_path / "model"))
    line = [*COMMAND, "launch", "-n", "2", "--", "generate", "--model", model, "--raw"]
    line += ["-p", "Once upon", "--temp", "0", "--max-tokens", "4000"]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout
        process.stdout.read(1)  # the first rank is under way
        listed = subprocess.check_output(["ps", "-e", "-o", "ppid=,pid="], text=True)
        pairs = [tuple(map(int, row.split())) for row in listed.splitlines()]
        ranks = [pid for parent, pid in pairs if parent == process.pid]
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err.lstrip()) == (status, message)
    assert len(ranks) == 2
    expect_end(*ranks)
