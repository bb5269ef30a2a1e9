"""`minicpm-mlx launch`: one command as several processes, on this machine or on several."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from minicpm_mlx.arguments import at_least_one
from minicpm_mlx.errors import InvalidArgumentError

from . import paths

COMMANDS = "dpo", "generate", "lora", "serve"
"""Commands that several processes can share."""
RANK = (
    "import sys; sys.path[:] = filter(None, sys.path); sys.argv[0] = 'minicpm-mlx'; "
    "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "from minicpm_mlx.cli.main import as_rank; as_rank()"
)
"""Program of each rank: the command line. It imports nothing from the current folder, and Ctrl-C
ends these imports without a traceback."""


def launch(
    command: Annotated[
        list[str] | None,
        typer.Argument(help="lora, dpo, generate or serve, and its arguments, after `--`."),
    ] = None,
    ranks: Annotated[int | None, typer.Option("-n", help="Processes on this machine.")] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="Machines, one process each.", callback=paths.checked(paths.input_file)),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="ring (the default), jaccl, mpi…")] = None,
    starting_port: Annotated[int | None, typer.Option(help="First port of the ranks.")] = None,
    python: Annotated[str | None, typer.Option(help="Python on the other machines.")] = None,
) -> None:
    """Run a command as several processes that share the work: launch -n 2 -- lora --data …

    The first prints as usual; of the others only errors are shown. One that fails ends all.
    Hostfiles and backends are those of mlx.launch.
    """
    from minicpm_mlx.distributed.launcher import run_python

    if not command or command[0] not in COMMANDS:
        got = f"; got {command[0]!r}" if command else ""
        raise InvalidArgumentError(
            f"launch needs a command to run: one of {', '.join(COMMANDS)}{got}"
        )
    if (ranks is None) == (hostfile is None):
        raise InvalidArgumentError("launch needs -n or --hostfile, and takes one of them alone")
    if ranks is not None:
        at_least_one("-n", ranks)
    program = ["-c", RANK, *command]
    status = run_python(program, ranks, hostfile, backend, starting_port, python)
    if status == 130:
        raise KeyboardInterrupt  # which ranks do not say of themselves
    sys.exit(status)
