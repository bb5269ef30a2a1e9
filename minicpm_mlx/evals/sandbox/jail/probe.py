"""The probe: a program that tries everything forbidden, and passes if all of it fails."""

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


def is_refused(attempt: Callable[..., object], *arguments: object) -> bool:
    try:
        attempt(*arguments)
    except PermissionError:
        return True
    except ConnectionRefusedError:  # there was a network to ask
        return False
    return False


def try_all(secret: str) -> None:
    """`secret` is a file of the parent that any other process of this user could read."""
    attempts: dict[str, tuple[Callable[..., object], object]] = {
        "ReadsFiles": (reads, secret),
        "ChangesFiles": (writes, secret),
        "MakesFiles": (writes, "made"),
        "RemovesFiles": (os.unlink, secret),
        "RunsCommands": (subprocess.check_call, [sys.executable, "--version"]),
    }
    failed = [
        name for name, (attempt, target) in attempts.items() if not is_refused(attempt, target)
    ]
    failed += ["UsesNetwork"] * (not is_refused(connects))
    failed += ["StartsProcesses"] * (not is_refused(starts))
    failed += ["SendsSignals"] * (not is_refused(os.kill, os.getppid(), 0))
    if failed:
        raise type("And".join(failed), (Exception,), {})
