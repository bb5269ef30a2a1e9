"""`minicpm-mlx launch`: what it refuses, what it tells each rank, and whole runs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpm_mlx.distributed import launcher
from minicpm_mlx.distributed.launcher import (
    Host,
    Hosts,
    read_hostfile,
    run_on,
)
from minicpm_mlx.distributed.processes import Ended
from minicpm_mlx.errors import InvalidArgumentError, MissingPackageError
from support.tiny_model import write_model

COMMAND = [sys.executable, "-c", "from minicpm_mlx.cli.main import main; main()"]
SHORT = ("generate", "--model", "demo", "--max-tokens", "4", "-p", "Once upon")
GREEDY = ("--temp", "0", "-p", "Once upon")
TOLD = """
import json, os, sys
from pathlib import Path
names = ("MLX_RANK", "MLX_JACCL_COORDINATOR", "MLX_JACCL_RING", "OPENBLAS_NUM_THREADS", "EXTRA")
found = {name: os.environ[name] for name in names if name in os.environ}
for name in ("MLX_HOSTFILE", "MLX_IBV_DEVICES"):
    if name in os.environ:
        found[name] = json.loads(Path(os.environ[name]).read_text())
print(json.dumps(found), file=sys.stderr)
"""
"""A rank's script: what it was told."""


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list]:
    """What each rank of these hosts is told, by rank."""
    for name in (*launcher.THREADS, *launcher.TOLD):
        monkeypatch.delenv(name, raising=False)

    def run(hosts: Hosts, **options: object) -> list[dict[str, object]]:
        assert run_on(hosts, [sys.executable, "-c", TOLD], **options) == Ended(0)
        lines = [line.partition("] ")[2] or line for line in capfd.readouterr().err.splitlines()]
        return sorted(map(json.loads, lines), key=lambda found: str(found.get("MLX_RANK")))

    return run


def here(ranks: int) -> Hosts:
    return Hosts((Host("127.0.0.1", ("127.0.0.1",)),) * ranks)


# Refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "2"], "launch needs a command to run: one of dpo, generate, lora, serve"),
        (["--", *SHORT], "launch needs a number of processes, or a hostfile"),
        (["-n", "0", "--", *SHORT], "the number of processes must be 1 or more, got 0"),
        (["-n", "2", "--", "chat"], "one of dpo, generate, lora, serve; got 'chat'"),
        (["-n", "2", "launch", "-n", "2", *SHORT], "several processes can share"),
        (["-n", "2", "--backend", "tcp", *SHORT], "ring, jaccl, jaccl-ring, mpi, got 'tcp'"),
        (["-n", "2", "--starting-port", "65535", *SHORT], "from 1 to 65534 for 2 addresses"),
        (["-n", "2", "--backend", "jaccl", *SHORT], "'rdma' of 127.0.0.1 must name 2 devices"),
        (["--hostfile", "absent.json", *SHORT], "absent.json: No such file or directory"),
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


def test_an_unknown_option_is_a_usage_error(command: Callable[..., int]) -> None:
    assert command("launch", "--what", "--", *SHORT) == 2


def test_more_processes_than_hosts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    path.write_text('[{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}]')
    with pytest.raises(InvalidArgumentError, match="2 processes need as many hosts; the hostfile"):
        launcher.launch(SHORT, ranks=2, hostfile=path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("7", "list of hosts"),
        ("{}", "list of hosts"),
        ("[7]", "'ssh' must be a name, got None"),
        ("[]", "list of hosts"),
        ('[{"ips": []}]', "'ssh' must be a name, got None"),
        ('[{"ssh": 7}]', "'ssh' must be a name, got 7"),
        ('[{"ssh": "-oProxyCommand=date"}]', "'ssh' must be a name, got '-o"),
        ('[{"ssh": "a", "ips": "10.0.0.1"}]', "'ips' of a must be a list"),
        ('[{"ssh": "a", "rdma": 3}]', "'rdma' of a must be a list"),
        ('{"hosts": [{"ssh": "a"}], "envs": ["A", 3]}', "'envs' must be a list of NAME=value"),
        ('{"hosts": [{"ssh": "a"}], "backend": 3}', "'backend' must be a name"),
    ],
)
def test_a_malformed_hostfile_is_a_named_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError, match=message):
        read_hostfile(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["hosts", "ssh", "ips", "rdma", "envs", "backend"]), inner
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_hostfile_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, value: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(value))
    with suppress(InvalidArgumentError):
        assert read_hostfile(path).hosts


def test_a_hostfiles_variables_must_be_some() -> None:
    with pytest.raises(InvalidArgumentError, match="NAME=value, got 'A; rm'"):
        run_on(Hosts(here(2).hosts, environment=("A; rm",)), ["true"])


def test_a_host_without_addresses_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="no 'ips' for mac2; ring needs them"):
        run_on(Hosts((*here(1).hosts, Host("mac2"))), ["true"])


def test_mpi_needs_mpirun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingPackageError, match="needs Open MPI's mpirun"):
        run_on(here(2), ["true"], backend="mpi")


# Told


def test_each_rank_has_a_port_of_its_own_and_a_share_of_the_cores(
    told: Callable[..., list], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_cores", lambda: 8)
    found = told(here(3))
    assert [each["MLX_RANK"] for each in found] == ["0", "1", "2"]
    assert {each["OPENBLAS_NUM_THREADS"] for each in found} == {"2"}
    [listen] = {json.dumps(each["MLX_HOSTFILE"]) for each in found}
    assert len({address for [address] in json.loads(listen)}) == 3
    assert all(address.startswith("127.0.0.1:") for [address] in json.loads(listen))


def test_threads_that_the_user_set_are_kept(
    told: Callable[..., list], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "5")
    assert {each["OPENBLAS_NUM_THREADS"] for each in told(here(2))} == {"5"}


def test_one_process_is_told_nothing(
    told: Callable[..., list], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even what a launch that it is part of was told."""
    monkeypatch.setenv("MLX_RANK", "1")
    monkeypatch.setenv("MLX_HOSTFILE", "absent")
    assert told(here(1)) == [{}]


def test_a_starting_port_and_variables_are_used(told: Callable[..., list]) -> None:
    found = told(Hosts(here(2).hosts, environment=("EXTRA=a b",)), starting_port=4000)
    assert {each["EXTRA"] for each in found} == {"a b"}
    assert found[0]["MLX_HOSTFILE"] == [["127.0.0.1:4000"], ["127.0.0.1:4001"]]


@pytest.mark.parametrize("backend", ["jaccl", "jaccl-ring"])
def test_jaccl_is_told_its_devices(told: Callable[..., list], backend: str) -> None:
    hosts = [
        Host("127.0.0.1", ("10.0.0.1",), (None, "rdma_en2")),
        Host("127.0.0.1", ("10.0.0.2",), ("rdma_en3", None)),
    ]
    found = told(Hosts(tuple(hosts), backend))[1]
    assert found.pop("MLX_JACCL_COORDINATOR") == "10.0.0.1:32323"
    assert found.pop("MLX_IBV_DEVICES") == [[None, "rdma_en2"], ["rdma_en3", None]]
    assert found.pop("MLX_JACCL_RING", None) == ("1" if backend == "jaccl-ring" else None)
    assert found.pop("MLX_RANK") == "1"


def test_another_machine_is_told_over_ssh(
    told: Callable[..., list], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stand-in for ssh runs what it was to run there in a shell here, with nothing inherited."""
    ssh = tmp_path / "ssh"
    ssh.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/log\nwhile [ $# -gt 1 ]; do shift; done\n'
        f'exec env -i PATH=/usr/bin:/bin TMPDIR={tmp_path} sh -c "$1"\n'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    away = Host("mac2", ("10.0.0.2",))
    found = told(Hosts((Host("127.0.0.1", ("10.0.0.1",)), away), environment=("EXTRA=it's",)))
    assert found[1] == {
        "MLX_RANK": "1",
        "EXTRA": "it's",
        "MLX_HOSTFILE": [["10.0.0.1:32323"], ["10.0.0.2:32324"]],
    }
    assert found[0] == {**found[1], "MLX_RANK": "0"}
    assert (tmp_path / "log").read_text().startswith("-tt -o LogLevel=QUIET mac2 sh -c ")
    assert not list(tmp_path.glob("tmp.*")), "the hostfile it was given is left there"
    exits = [sys.executable, "-c", "import os, sys; print(1); sys.exit(3)"]
    assert run_on(Hosts((here(1).hosts[0], away)), ["true"], away=exits) == Ended(3)


def test_free_ports_are_free_and_below_those_of_outgoing_connections() -> None:
    found = launcher._free_ports(5)
    assert len(set(found)) == 5
    assert all(20000 <= port < 32000 for port in found)
    with ExitStack() as stack:
        for port in found:
            stack.enter_context(socket.socket()).bind(("", port))


# Whole runs


@pytest.fixture(scope="module")
def generate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A command that two processes can share, and that goes on for thousands of tokens."""
    model = write_model(tmp_path_factory.mktemp("tiny") / "model")
    return ("generate", "--model", str(model), "--raw", *GREEDY)


def test_a_launch_prints_what_the_command_prints_alone(
    generate: tuple[str, ...], command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    few = (*generate, "--max-tokens", "12")
    assert command(*few) == 0
    alone = capsys.readouterr().out
    assert len(alone) > 4
    done = subprocess.run(
        [*COMMAND, "launch", "-n", "2", "--", *few], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, alone, "")


def test_a_mistake_that_all_make_is_said_once() -> None:
    command = [*COMMAND, "launch", "-n", "3", "generate", "-m", "no-such", "-p", "a"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("minicpm-mlx: no model named 'no-such'")
    assert done.stderr.count("\n") == 1


def test_nothing_is_imported_from_the_folder_it_is_called_in(tmp_path: Path) -> None:
    for name in ("json", "minicpm_mlx", "typer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    code = f"import sys; sys.path.remove(''); {COMMAND[2]}"
    command = [sys.executable, "-c", code, "launch", "-n", "2", "generate", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: minicpm-mlx generate" in done.stdout


def ranks_of(process: subprocess.Popen[str], count: int) -> list[int]:
    """The processes that a launch has started, once there are so many."""
    for _ in range(200):
        listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True)
        pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
        found = [pid for pid, parent in pairs if parent == process.pid]
        if len(found) == count:
            return found
        time.sleep(0.05)
    raise AssertionError("the ranks did not start")


def launched(generate: tuple[str, ...]) -> subprocess.Popen[str]:
    line = [*COMMAND, "launch", "-n", "2", "--", *generate, "--max-tokens", "4000"]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_interrupted_launch_says_so_once_and_leaves_nothing(generate: tuple[str, ...]) -> None:
    process = launched(generate)
    found = ranks_of(process, 2)
    assert process.stdout is not None
    process.stdout.read(1)  # the first rank at least is under way
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.split() == ["minicpm-mlx:", "interrupted"]
    for pid in found:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_killed_rank_is_one_line(generate: tuple[str, ...]) -> None:
    process = launched(generate)
    found = ranks_of(process, 2)
    os.kill(max(found), signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 137
    assert err == "minicpm-mlx: rank 1 was ended by SIGKILL; the launch ended with it\n"
