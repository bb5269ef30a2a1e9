"""Programs that a model wrote, run in processes that can hurt nothing, judged by how they end.

A process reads Python's own library and no other file, though it may find out which exist. It
makes and changes no file, knows no network, starts no process (on Linux no thread either), signals
nobody, and is held to seconds and bytes; its folder is empty and goes with it. Linux holds it with
Landlock and seccomp, macOS with sandbox-exec. Where neither works no program is run.

A program passes when its last line has run: exit codes, what it prints and what it does to Python's
builtins count for nothing. One that was written against this very file could still look for the
channel to the parent and answer on it, or return objects that are equal to everything: checks that
share a process with what they check cannot rule that out. It could not do harm.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ...arguments import (
    at_least_one,
    number,
    shown,
    whole,
)
from ...errors import InvalidArgumentError
from .jail import landlock, seatbelt
from .jail.main import READY

SECONDS = 3.0
"""UltraEval's."""
MEMORY = 1 << 30
START = 60.0
"""Seconds in which Python must have started, on a machine however busy."""

FOLDER = Path(__file__).parent
BOOT = "import sys; sys.path.append(sys.argv.pop(1)); from jail.main import run; run()"
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""All of it: the same program has its sets in the same order each time."""

LIBRARIES = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo",
    "/etc/ld.so.cache", "/nix/store", "/opt/homebrew/Cellar", "/opt/homebrew/opt",
    "/usr/local/Cellar", "/usr/local/opt",
)  # fmt: skip
"""Where the C libraries that Python's modules load may be."""

ADVICE = "use Linux 5.13 or later with Landlock, or macOS, or leave code tasks out"


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    passed: bool
    reason: str
    """"passed", "failed: AssertionError", "timed out", "killed: memory", "killed: SIGSEGV" or
    "left before its end"."""


@cache
def containment() -> str:
    """What holds programs here, such as "Landlock 7 and seccomp", proven by one that tries.

    InvalidArgumentError where they cannot be held.
    """
    if sys.platform == "darwin":
        level = "sandbox-exec"
    elif sys.platform == "linux":
        level = f"Landlock {landlock.version()} and seccomp"
    else:
        raise InvalidArgumentError(
            f"programs a model wrote are not run on {sys.platform}; {ADVICE}"
        )
    probe = (FOLDER / "jail" / "probe.py").read_text(encoding="utf-8")
    with tempfile.NamedTemporaryFile(prefix="minicpm-mlx-") as secret:
        outcome = _run(f"{probe}\ntry_all({secret.name!r})\n", START, MEMORY)
    if not outcome.passed:
        raise InvalidArgumentError(
            f"programs a model wrote are not run here: {level} holds them not ({outcome.reason}); "
            f"{ADVICE}"
        )
    return level


def run_program(program: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> Outcome:
    """Run the Python text `program` and say whether it came to its end.

    `seconds` are on the clock, from when Python has started; `memory` is in bytes, the
    interpreter's own among them. InvalidArgumentError where the machine cannot contain it.

    >>> run_program("assert 1 + 1 == 2")
    Outcome(passed=True, reason='passed')
    """
    if not 0 < number("seconds", seconds) < math.inf:
        raise InvalidArgumentError(f"seconds must be more than 0, got {shown(seconds)}")
    if whole("memory", memory) < 1 << 26:
        raise InvalidArgumentError(
            f"memory must be {1 << 26} bytes or more, as Python takes, got {shown(memory)}"
        )
    containment()
    return _run(program, float(seconds), memory)


def run_programs(
    programs: Iterable[str],
    workers: int | None = None,
    *,
    seconds: float = SECONDS,
    memory: int = MEMORY,
) -> Iterator[Outcome]:
    """The outcomes of many programs, in order, each as soon as it is known.

    `workers` of them run at once, by default one for each core. Errors as `run_program`.
    """
    count = at_least_one("workers", (os.cpu_count() or 1) if workers is None else workers)
    containment()  # once, before the workers would each find out
    pool = ThreadPoolExecutor(count)
    try:
        runs = [pool.submit(run_program, p, seconds=seconds, memory=memory) for p in programs]
        for run in runs:
            yield run.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _run(program: str, seconds: float, memory: int) -> Outcome:
    text = program.encode("utf-8", "surrogatepass")
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryDirectory(prefix="minicpm-mlx-") as folder:
        with theirs:
            limits = (len(text), math.ceil(seconds) + 1, memory)
            process = _start([str(n) for n in (theirs.fileno(), *limits)], theirs, folder)
        try:
            return _watch(process, ours, text, seconds, memory)
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError, PermissionError):  # macOS's word for a zombie
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.wait()


def _start(arguments: list[str], channel: socket.socket, folder: str) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            _command(arguments),
            cwd=folder,
            env=ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(channel.fileno(),),
            start_new_session=True,  # so that it can be killed with all that it may have started
        )
    except OSError as error:
        raise InvalidArgumentError(
            f"programs a model wrote are not run here: no process starts ({error}); {ADVICE}"
        ) from None


def _command(arguments: list[str]) -> list[str]:
    """The process's command line; the interpreter is the one that a virtual environment is of."""
    # Python's own word for it, which is no public one; a copy without it is none of an environment.
    interpreter = str(getattr(sys, "_base_executable", "") or sys.executable)
    readable = [*_library(), *LIBRARIES]
    python = [interpreter, "-s", "-S", "-B", "-X", "utf8", "-c", BOOT, str(FOLDER), *arguments]
    if sys.platform == "darwin":
        seen = [*readable, sys.base_prefix, str(FOLDER / "jail")]
        return seatbelt.command([*python, *readable], seen, sys.base_prefix)
    return [*python, *readable]


def _library() -> list[str]:
    """Python's own modules, and the libraries of its prefix."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    paths = [sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib")]
    return list(dict.fromkeys([*paths, f"{sys.base_prefix}/lib"]))


def _watch(
    process: subprocess.Popen[bytes],
    channel: socket.socket,
    program: bytes,
    seconds: float,
    memory: int,
) -> Outcome:
    token = secrets.token_hex(16).encode()
    channel.settimeout(START)
    with suppress(OSError):  # what went wrong there is read below
        channel.sendall(program + token)
    began = _receive(process, channel, START, memory, len(READY))
    if began.said != READY:
        why = (began.said + _receive(process, channel, 1, memory).said).decode(errors="replace")
        raise InvalidArgumentError(
            "programs a model wrote are not run here: Python would not start shut in "
            f"({' '.join(why.split()) or began.stopped or 'it ended'}); {ADVICE}"
        )
    heard = _receive(process, channel, seconds, memory)
    if heard.said == token[::-1]:
        return Outcome(True, "passed")
    if heard.stopped:
        return Outcome(False, heard.stopped)
    if failed := re.fullmatch(rb"failed: (\w{1,80})", heard.said):
        return Outcome(False, f"failed: {failed[1].decode()}")
    return Outcome(False, _ended(process))


@dataclass(frozen=True)
class _Heard:
    said: bytes
    stopped: str = ""
    """Why listening ended before the process did."""


def _receive(
    process: subprocess.Popen[bytes],
    channel: socket.socket,
    seconds: float,
    memory: int,
    most: int = 256,
) -> _Heard:
    """What the process says until it ends, or has said `most` bytes."""
    said = b""
    deadline = time.monotonic() + seconds
    watched = sys.platform == "darwin"
    while len(said) < most:
        left = deadline - time.monotonic()
        if left <= 0:
            return _Heard(said, "timed out")
        if watched and seatbelt.footprint(process.pid) > memory:
            return _Heard(said, "killed: memory")
        channel.settimeout(min(left, 0.02) if watched else left)
        try:
            part = channel.recv(most - len(said))
        except TimeoutError:
            continue
        except ConnectionError:
            break
        if not part:
            break
        said += part
    return _Heard(said)


def _ended(process: subprocess.Popen[bytes]) -> str:
    """What became of a process that closed its channel without a word."""
    try:
        status = process.wait(1)
    except subprocess.TimeoutExpired:
        return "left before its end"
    if -status in (signal.SIGXCPU, signal.SIGALRM):
        return "timed out"
    return f"killed: {signal.Signals(-status).name}" if status < 0 else "left before its end"
