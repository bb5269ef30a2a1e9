"""A program that tries what a program must not be able to do; it ends well if all of it failed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def reads(path: str) -> None:
    Path(path).read_bytes()


def writes(path: str) -> None:
    Path(path).write_text("here")


def connects() -> None:
    with socket.socket() as made:
        made.connect(("127.0.0.1", 9))


def starts() -> None:
    if os.fork() == 0:
        os._exit(0)


def stopped(attempt: Callable[..., object], *arguments: object) -> bool:
    try:
        attempt(*arguments)
    except PermissionError:
        return True
    except ConnectionRefusedError:  # there was a network to ask
        return False
    return False


def try_all(secret: str) -> None:
    """`secret` is a file of the parent's that anything else of this user could read."""
    attempts: dict[str, tuple[Callable[..., object], object]] = {
        "ReadsFiles": (reads, secret),
        "ChangesFiles": (writes, secret),
        "MakesFiles": (writes, "made"),
        "RemovesFiles": (os.unlink, secret),
        "RunsCommands": (subprocess.check_call, [sys.executable, "--version"]),
    }
    failed = [name for name, (attempt, given) in attempts.items() if not stopped(attempt, given)]
    failed += ["UsesNetwork"] * (not stopped(connects))
    failed += ["StartsProcesses"] * (not stopped(starts))
    failed += ["SendsSignals"] * (not stopped(os.kill, os.getppid(), 0))
    if failed:
        raise type("And".join(failed), (Exception,), {})
