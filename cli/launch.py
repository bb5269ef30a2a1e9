"""`minicpm-mlx launch`: one command as several processes, on this machine or on several."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from .render.theme import console


def launch(
    command: Annotated[
        list[str] | None,
        typer.Argument(help="lora, dpo or generate, and its arguments, after `--`."),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option("-n", help="Processes; of a hostfile by default one a host.")
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option("--hostfile", help="The machines, as mlx.launch reads them.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", help="ring (the default), jaccl, jaccl-ring or mpi.")
    ] = None,
    starting_port: Annotated[
        int | None, typer.Option("--starting-port", help="The first port; one more for each rank.")
    ] = None,
    python: Annotated[
        str | None, typer.Option("--python", help="Python on the other machines, if not as here.")
    ] = None,
) -> None:
    """Run a command as several processes that share the work: launch -n 2 -- lora --data …

    The first prints as usual; of the others only errors are shown. One that fails ends all.
    """
    from minicpm_mlx.distributed.launcher import launch as launched

    ended = launched(
        command or [],
        ranks=ranks,
        hostfile=hostfile,
        backend=backend,
        starting_port=starting_port,
        python=python,
    )
    for rank, name in ended.killed:
        line = f"minicpm-mlx: rank {rank} was ended by {name}; the launch ended with it"
        console(stderr=True).print(line)
    if ended.status == 130:
        raise KeyboardInterrupt  # which ranks do not say of themselves
    sys.exit(ended.status)


def as_rank() -> None:
    """The command line, as each rank of a launch runs it."""
    from minicpm_mlx.distributed.processes import end_with_the_launcher

    from .main import main

    end_with_the_launcher()
    try:
        main()
    except SystemExit as ended:
        if ended.code and "OMPI_COMM_WORLD_SIZE" in os.environ:
            # MPI's own end is a meeting: it would wait for ranks that do not know of the failure.
            sys.stderr.flush()
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        raise
