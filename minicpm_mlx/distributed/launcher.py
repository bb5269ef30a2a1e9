"""One of our commands as several processes: here, or on the machines of a hostfile.

Hostfiles are MLX's, and so are the variables that tell each rank what to talk by (its documentation
of distributed communication describes both); the processes themselves are `ranks`'s.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..arguments import shown, whole
from ..errors import InvalidArgumentError, MissingPackageError
from .processes import (
    LAUNCHED,
    Ended,
    Start,
    run,
)

COMMANDS = ("dpo", "generate", "lora", "serve")
"""Commands of which several processes make sense."""
BACKENDS = ("ring", "jaccl", "jaccl-ring", "mpi")
PORT = 32323
"""The first port used between machines, as mlx.launch has it."""
HERE = ("127.0.0.1", "localhost")
LIBRARY = "libmpi.dylib" if sys.platform == "darwin" else "libmpi.so"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""What the BLAS libraries read to know how many cores to use; by default each takes all."""
TOLD = (
    "MLX_RANK",
    "MLX_HOSTFILE",
    "MLX_IBV_DEVICES",
    "MLX_JACCL_COORDINATOR",
    "MLX_JACCL_RING",
    "OMPI_COMM_WORLD_SIZE",
)
"""By what a rank knows of its launch."""
RANK = (
    "import sys; sys.path[:] = filter(None, sys.path); sys.argv[0] = 'minicpm-mlx'; "
    "from minicpm_mlx.cli.launch import as_rank; as_rank()"
)
"""What each rank runs: the command line, which imports nothing from the folder it is called in."""
SILENT = '[ "$OMPI_COMM_WORLD_RANK" = 0 ] || exec >/dev/null; exec "$@"'
"""Run by a shell: drops the results of all ranks that mpirun starts but the first."""


@dataclass(frozen=True)
class Host:
    """A machine that runs one rank."""

    ssh: str
    """What ssh calls it; 127.0.0.1 is this machine, and needs no ssh."""
    ips: tuple[str, ...] = ()
    """Addresses at which the other ranks reach it."""
    rdma: tuple[Any, ...] = ()
    """For jaccl: its device (or several) towards each rank, None towards itself."""

    @property
    def here(self) -> bool:
        return self.ssh in HERE


@dataclass(frozen=True)
class Hosts:
    """What a hostfile says."""

    hosts: tuple[Host, ...]
    """One a rank."""
    backend: str | None = None
    """What they are to talk by."""
    environment: tuple[str, ...] = ()
    """NAME=value for each rank."""


def launch(
    command: Sequence[str],
    *,
    ranks: int | None = None,
    hostfile: Path | None = None,
    backend: str | None = None,
    starting_port: int | None = None,
    python: str | None = None,
) -> Ended:
    """Run a command of `minicpm-mlx` as several processes until all have ended.

    `command` is its name and arguments: one of COMMANDS. `ranks` processes run on this machine, or
    on the first so many of `hostfile` (by default all of it). Rank 0's output is this process's;
    see `ranks.run` for errors and signals. Rank k listens on `starting_port` + k: by default a free
    port here, PORT between machines. `python` is the interpreter to use on other machines, by
    default one at the same path as this. InvalidArgumentError where any of this cannot be done.
    """
    _check_command(command)
    if hostfile is None:
        found = Hosts((Host(HERE[0], HERE[:1]),) * _count(ranks, None))
    else:
        found = read_hostfile(hostfile)
        found = replace(found, hosts=found.hosts[: _count(ranks, len(found.hosts))])
    return run_on(
        found,
        [sys.executable, "-c", RANK, *command],
        away=[python or sys.executable, "-c", RANK, *command],
        backend=backend,
        starting_port=starting_port,
    )


def run_on(
    found: Hosts,
    program: Sequence[str],
    *,
    away: Sequence[str] = (),
    backend: str | None = None,
    starting_port: int | None = None,
) -> Ended:
    """Run any program as the ranks of these hosts; `away` is what it is called on other machines.

    The rest is as for `launch`.
    """
    away = away or program
    chosen = backend or found.backend or "ring"
    if chosen not in BACKENDS:
        raise InvalidArgumentError(f"backend must be one of {', '.join(BACKENDS)}, got {chosen!r}")
    variables = {LAUNCHED: "1"} | dict(_variable(each) for each in found.environment)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="minicpm-mlx-")))
        if len(found.hosts) == 1:
            files: dict[str, str] = {}
        elif chosen == "mpi":
            return run([_by_mpi(found.hosts, away, variables, folder)])
        else:
            told, files = _told(chosen, found.hosts, starting_port)
            variables |= told
        starts = []
        for rank, host in enumerate(found.hosts):
            own = variables | ({"MLX_RANK": str(rank)} if len(found.hosts) > 1 else {})
            if host.here:
                starts.append(_here(program, _threads(found.hosts) | own, files, folder))
            else:
                starts.append(_away(host, rank, away, own, files))
        return run(starts)


def read_hostfile(path: Path) -> Hosts:
    """A hostfile of MLX: {"hosts": [{"ssh": name, "ips": [address]}], ...}, or just that list.

    InvalidArgumentError where it is missing or malformed.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InvalidArgumentError(f"{path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{path} is not JSON ({error}); expected a hostfile") from None
    if isinstance(found, list):
        found = {"hosts": found}
    listed = found.get("hosts") if isinstance(found, dict) else None
    if not isinstance(listed, list) or not listed:
        raise InvalidArgumentError(f"{path}: expected a list of hosts, got {shown(listed)}")
    backend, variables = found.get("backend", ""), found.get("envs", [])
    if not isinstance(backend, str):
        raise InvalidArgumentError(f"{path}: 'backend' must be a name, got {shown(backend)}")
    if not _texts(variables):
        raise InvalidArgumentError(f"{path}: 'envs' must be a list of NAME=value")
    return Hosts(tuple(_host(path, each) for each in listed), backend or None, tuple(variables))


def _host(path: Path, entry: Any) -> Host:
    entry = entry if isinstance(entry, dict) else {}
    name, ips, devices = entry.get("ssh"), entry.get("ips", []), entry.get("rdma", [])
    if not isinstance(name, str) or not name or name.startswith("-"):  # ssh would read an option
        raise InvalidArgumentError(f"{path}: a host's 'ssh' must be a name, got {shown(name)}")
    if not _texts(ips):
        raise InvalidArgumentError(f"{path}: 'ips' of {name} must be a list of addresses")
    if not isinstance(devices, list):
        raise InvalidArgumentError(f"{path}: 'rdma' of {name} must be a list of devices")
    return Host(name, tuple(ips), tuple(devices))


def _check_command(command: Sequence[str]) -> None:
    known = ", ".join(COMMANDS)
    if not command:
        raise InvalidArgumentError(f"launch needs a command to run: one of {known}")
    if command[0] not in COMMANDS:
        raise InvalidArgumentError(
            f"launch runs what several processes can share: one of {known}; got {command[0]!r}"
        )


def _count(ranks: int | None, listed: int | None) -> int:
    if ranks is None:
        if listed is None:
            raise InvalidArgumentError("launch needs a number of processes, or a hostfile")
        return listed
    if whole("the number of processes", ranks) < 1:
        raise InvalidArgumentError(f"the number of processes must be 1 or more, got {ranks}")
    if listed is not None and ranks > listed:
        raise InvalidArgumentError(
            f"{ranks} processes need as many hosts; the hostfile has {listed}"
        )
    return ranks


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _variable(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not name.isidentifier():
        raise InvalidArgumentError(f"'envs' of a hostfile must be NAME=value, got {text!r}")
    return name, value


def _told(
    backend: str, hosts: Sequence[Host], port: int | None
) -> tuple[dict[str, str], dict[str, str]]:
    """What the ranks are told: variables, and variables that name a file with this text."""
    missing = next((host.ssh for host in hosts if not host.ips), None)
    if missing is not None:
        raise InvalidArgumentError(
            f"the hostfile gives no 'ips' for {missing}; {backend} needs them"
        )
    if backend == "ring":
        ports = iter(_ports(hosts, port))
        listen = [[f"{ip}:{next(ports)}" for ip in host.ips] for host in hosts]
        return {}, {"MLX_HOSTFILE": json.dumps(listen)}
    for rank, host in enumerate(hosts):
        if len(host.rdma) != len(hosts) or host.rdma[rank] is not None:
            raise InvalidArgumentError(
                f"'rdma' of {host.ssh} must name {len(hosts)} devices, one a rank, and null for "
                f"itself (rank {rank}); mlx.distributed_config writes such a hostfile"
            )
    told = {"MLX_JACCL_COORDINATOR": f"{hosts[0].ips[0]}:{port or PORT}"}
    if backend == "jaccl-ring":
        told["MLX_JACCL_RING"] = "1"
    return told, {"MLX_IBV_DEVICES": json.dumps([host.rdma for host in hosts])}


def _ports(hosts: Sequence[Host], first: int | None) -> list[int]:
    count = sum(len(host.ips) for host in hosts)
    if first is None and all(host.here for host in hosts):
        return _free_ports(count)
    first = PORT if first is None else first
    if not 1 <= first <= 65536 - count:
        raise InvalidArgumentError(
            f"starting_port must be from 1 to {65536 - count} for {count} addresses, got {first}"
        )
    return list(range(first, first + count))


def _free_ports(count: int) -> list[int]:
    """Ports that nothing here listens on, drawn so that launches at one time take others.

    They lie below those that systems give to outgoing connections: a rank that tries to reach one
    where nobody listens yet could be given that very port, and be connected to itself.
    """
    found: list[int] = []
    with ExitStack() as stack:
        for port in random.SystemRandom().sample(range(20000, 32000), 1000):
            listener = stack.enter_context(socket.socket())
            try:
                listener.bind(("", port))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise InvalidArgumentError(f"{count} free ports are needed; give a starting port")


def _threads(hosts: Sequence[Host]) -> dict[str, str]:
    """Each rank's share of this machine's cores, where the user has not said how many."""
    ranks = sum(host.here for host in hosts)
    if ranks < 2 or any(name in os.environ for name in THREADS):
        return {}
    return dict.fromkeys(THREADS, str(max(_cores() // ranks, 1)))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _here(
    program: Sequence[str], variables: Mapping[str, str], files: Mapping[str, str], folder: Path
) -> Start:
    named = {name: str(folder / name) for name in files}
    for name, text in files.items():
        Path(named[name]).write_text(text, encoding="utf-8")
    # Not what a launch that this one is part of has told: it would be taken for a rank of that.
    kept = {name: value for name, value in os.environ.items() if name not in TOLD}
    return Start(program, {**kept, **variables, **named})


def _away(
    host: Host,
    rank: int,
    program: Sequence[str],
    variables: Mapping[str, str],
    files: Mapping[str, str],
) -> Start:
    """A rank that ssh starts: in the folder of this name, if that machine has it.

    The terminal that ssh is asked for ends it with the connection.
    """
    quote = shlex.quote
    lines = ["stty -echo 2>/dev/null", f"cd {quote(str(Path.cwd()))} 2>/dev/null"]
    lines += [f"export {name}={quote(value)}" for name, value in variables.items()]
    for name, text in files.items():
        lines += [f"{name}=$(mktemp)", f"export {name}", f'printf %s {quote(text)} >"${name}"']
    removal = "".join(f' "${name}"' for name in files)
    drop = " 3>&1 >/dev/null 2>&3" if rank else ""  # its terminal has one stream: keep the errors
    lines += [shlex.join(program) + drop, f"status=$?; rm -f{removal}; exit $status"]
    ssh = ["ssh", "-tt", "-o", "LogLevel=QUIET", host.ssh, "sh -c " + quote("; ".join(lines))]
    return Start(ssh, dict(os.environ), remote=True)


def _by_mpi(
    hosts: Sequence[Host], program: Sequence[str], variables: Mapping[str, str], folder: Path
) -> Start:
    """mpirun, which starts the ranks, ends them together and passes on rank 0's input itself."""
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        raise MissingPackageError("the mpi backend needs Open MPI's mpirun; brew install open-mpi")
    names = [host.ssh for host in hosts]
    slots = [f"{name} slots={names.count(name)}" for name in dict.fromkeys(names)]
    (folder / "hosts").write_text("\n".join(slots) + "\n", encoding="utf-8")
    variables = {**_threads(hosts), **variables}
    library = Path(mpirun).parents[1] / "lib" / LIBRARY
    if library.exists() and "MLX_MPI_LIBNAME" not in os.environ:
        variables["MLX_MPI_LIBNAME"] = str(library)  # MLX looks on the system's path alone
    exported = [part for name in variables for part in ("-x", name)]
    command = [mpirun, "-n", str(len(hosts)), "--hostfile", str(folder / "hosts"), *exported]
    return Start([*command, "sh", "-c", SILENT, "sh", *program], {**os.environ, **variables})
