"""Runs Python on several ranks with the code of `mlx.launch`: its hostfiles, ssh and backends.

Only the supervision of the processes is ours: mlx.launch exits with 0 whatever its ranks did, mixes
their output, and leaves them behind on SIGTERM (MLX 0.32.4).
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..errors import InvalidArgumentError
from . import processes
from .collectives import LAUNCHED

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""Thread limits that BLAS libraries read; without one, each rank would use all cores."""
PYTHON = 'exec "${MINICPM_MLX_PYTHON:-$0}" "$@"'
"""Shell script that starts Python: ours on this machine, `python` of `run_python` on others."""
PIDFILE = 'pidfile=$(mktemp); echo $$ > $pidfile; printf "%s\\n" $pidfile; '
"""Start of each script that MLX writes; removed, as it prints a line among the results."""
REFUSALS = AttributeError, LookupError, TypeError, ValueError, subprocess.CalledProcessError
"""Errors of MLX's launcher: of options, a malformed hostfile, or a program that is not there."""


def run_python(
    arguments: Sequence[str],
    ranks: int | None = None,
    hostfile: Path | None = None,
    backend: str | None = None,
    starting_port: int | None = None,
    python: str | None = None,
) -> int:
    """Run Python with these arguments: `ranks` processes here, or one on each host of `hostfile`.

    Options are those of mlx.launch; InvalidArgumentError if it refuses one. Returns the exit status
    of `processes.run`. `python` is the interpreter on other machines.
    """
    options = ["--hostfile", str(hostfile)] if hostfile else ["-n", str(ranks)]
    if hostfile is None:
        backend = backend or "ring"
        # Random, so that two launches do not meet; below the ports of outgoing connections, of
        # which a rank that dials too early could be given the very one, and reach itself.
        starting_port = starting_port or random.SystemRandom().randrange(20000, 31000)
    options += ["--backend", backend] if backend else []
    options += ["--starting-port", str(starting_port)] if starting_port else []
    options += ["--env", f"{LAUNCHED}=1", "--"]
    options += ["sh", "-c", PYTHON, python or sys.executable, *arguments]
    with tempfile.TemporaryDirectory(prefix="minicpm-mlx-") as folder:
        # MLX leaves files for local ranks in TMPDIR.
        environment = {**os.environ, "TMPDIR": folder, "MINICPM_MLX_PYTHON": sys.executable}
        if ranks and not any(name in os.environ for name in THREADS):
            cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
            environment |= dict.fromkeys(THREADS, str(max(cores // ranks, 1)))
        return _run_mlx_launch(options, environment)


def _run_mlx_launch(options: Sequence[str], environment: dict[str, str]) -> int:
    mlx_launch: Any = import_module("mlx._distributed_utils.launch")
    commands: list[str] = []
    statuses: list[int] = []  # of mpirun

    class Parser(argparse.ArgumentParser):
        def parse_known_args(self, *_: Any) -> Any:  # type: ignore[override]
            return super().parse_known_args(options)

        def error(self, message: str) -> Any:
            raise ValueError(message)

    def launch_with_io(command_class: Any, ranks: Sequence[Any], *_: Any) -> None:
        for positional, keywords in ranks:
            command_class(*positional, **keywords)  # calls Popen

    def run(command: Sequence[str], **options: Any) -> Any:
        if options:  # MLX looks for a program
            return subprocess.run(command, **options)
        return statuses.append(processes.run([shlex.join(command)], environment))

    mlx_launch.argparse = SimpleNamespace(ArgumentParser=Parser)
    mlx_launch.Popen = lambda command, **_: commands.append(command.replace(PIDFILE, ""))
    mlx_launch._launch_with_io, mlx_launch.run = launch_with_io, run
    try:
        mlx_launch.main()
    except REFUSALS as error:
        raise InvalidArgumentError(f"mlx.launch: {error}") from None
    if not commands and not statuses:
        raise InvalidArgumentError("mlx.launch: the hostfile lists no hosts")
    return statuses[0] if statuses else processes.run(commands, environment)
