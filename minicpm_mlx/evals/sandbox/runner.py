"""Runs programs that a model wrote in sandboxed processes, and scores how they end.

A process reads Python's own library and no other file, though it can find out which files exist. It
creates and changes no file, has no network, starts no process (on Linux no thread either), sends
signals to no other process, and has limits of time and memory. Its folder is empty and temporary.
Linux contains it with Landlock and seccomp, macOS with sandbox-exec. Without those no program runs.

A program passes when its last line has run; exit codes, output and changes of Python's builtins do
not count. A program written against this very file could still find the channel to the parent and
answer on it, or return objects that equal everything: checks in the same process cannot prevent
that. It could do no harm.
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

from ...arguments import at_least_one, number, shown, whole
from ...errors import InvalidArgumentError
from .jail import landlock, seatbelt
from .jail.main import READY

SECONDS = 3.0
"""UltraEval's."""
MEMORY = 1 << 30
START = 60.0
"""Seconds for Python to start, even on a busy machine."""

FOLDER = Path(__file__).parent
BOOT = "import sys; sys.path.append(sys.argv.pop(1)); from jail.main import run; run()"
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
"""The whole environment; with this seed a program iterates its sets in the same order each time."""

LIBRARIES = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo",
    "/etc/ld.so.cache", "/nix/store", "/opt/homebrew/Cellar", "/opt/homebrew/opt",
    "/usr/local/Cellar", "/usr/local/opt",
)  # fmt: skip
"""Possible folders of the C libraries that Python's modules load."""

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
    """The containment in use, such as "Landlock 7 and seccomp", tested with a probe program.

    InvalidArgumentError where programs cannot be contained.
    """
    if sys.platform == "darwin":
        level = "sandbox-exec"
    elif sys.platform == "linux":
        level = f"Landlock {landlock.version()} and seccomp"
    else:
        raise InvalidArgumentError(f"programs a model wrote do not run on {sys.platform}; {ADVICE}")
    probe = (FOLDER / "jail" / "probe.py").read_text(encoding="utf-8")
    with tempfile.NamedTemporaryFile(prefix="minicpm-mlx-") as secret:
        outcome = _run(f"{probe}\ntry_all({secret.name!r})\n", START, MEMORY)
    if not outcome.passed:
        raise InvalidArgumentError(
            f"programs a model wrote do not run here: {level} does not contain them "
            f"({outcome.reason}); {ADVICE}"
        )
    return level


def run_program(program: str, *, seconds: float = SECONDS, memory: int = MEMORY) -> Outcome:
    """Runs the Python text `program` and returns how it ended.

    `seconds` are wall-clock time from when Python has started; `memory` is in bytes and includes
    the interpreter's. InvalidArgumentError where the machine cannot contain the program.

    >>> run_program("assert 1 + 1 == 2")
    Outcome(passed=True, reason='passed')
    """
    if not 0 < number("seconds", seconds) < math.inf:
        raise InvalidArgumentError(f"seconds must be more than 0, got {shown(seconds)}")
    if whole("memory", memory) < 1 << 26:
        raise InvalidArgumentError(
            f"memory must be {1 << 26} bytes or more, which Python needs, got {shown(memory)}"
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
    """The outcomes of many programs in order, each as soon as it is known.

    `workers` programs run at a time, by default one for each core. Errors as `run_program`.
    """
    count = at_least_one("workers", (os.cpu_count() or 1) if workers is None else workers)
    containment()  # once, before each worker would probe
    pool = ThreadPoolExecutor(count)
    try:
        runs = [pool.submit(run_program, p, seconds=seconds, memory=memory) for p in programs]
        for run in runs:
            yield run.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _run(program: str, seconds: float, memory: int) -> Outcome:
    text = program.encode("utf-8", "surrogatepass")
    parent_end, child_end = socket.socketpair()
    with parent_end, tempfile.TemporaryDirectory(prefix="minicpm-mlx-") as folder:
        with child_end:
            limits = (len(text), math.ceil(seconds) + 1, memory)
            process = _start([str(n) for n in (child_end.fileno(), *limits)], child_end, folder)
        try:
            return _watch(process, parent_end, text, seconds, memory)
        finally:
            if process.poll() is None:
                # macOS raises PermissionError for a zombie.
                with suppress(ProcessLookupError, PermissionError):
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
            start_new_session=True,  # so that it is killed with any process it may have started
        )
    except OSError as error:
        raise InvalidArgumentError(
            f"programs a model wrote do not run here: no process starts ({error}); {ADVICE}"
        ) from None


def _command(arguments: list[str]) -> list[str]:
    """The process's command line, with the base interpreter of a virtual environment."""
    # A private attribute; an interpreter without it belongs to no virtual environment.
    interpreter = str(getattr(sys, "_base_executable", "") or sys.executable)
    readable = [*_python_library(), *LIBRARIES]
    python = [interpreter, "-s", "-S", "-B", "-X", "utf8", "-c", BOOT, str(FOLDER), *arguments]
    if sys.platform == "darwin":
        visible = [*readable, sys.base_prefix, str(FOLDER / "jail")]
        return seatbelt.command([*python, *readable], visible, sys.base_prefix)
    return [*python, *readable]


def _python_library() -> list[str]:
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
    with suppress(OSError):  # the cause is read below
        channel.sendall(program + token)
    start = _receive(process, channel, START, memory, len(READY))
    if start.data != READY:
        data = start.data + _receive(process, channel, 1, memory).data
        reason = " ".join(data.decode(errors="replace").split())
        raise InvalidArgumentError(
            "programs a model wrote do not run here: Python does not start in the sandbox "
            f"({reason or start.limit or 'it ended'}); {ADVICE}"
        )
    result = _receive(process, channel, seconds, memory)
    if result.data == token[::-1]:
        return Outcome(True, "passed")
    if result.limit:
        return Outcome(False, result.limit)
    if error := re.fullmatch(rb"failed: (\w{1,80})", result.data):
        return Outcome(False, f"failed: {error[1].decode()}")
    return Outcome(False, _exit_reason(process))


@dataclass(frozen=True)
class _Received:
    """Bytes from the process's channel."""

    data: bytes
    limit: str = ""
    """The limit that the process reached: "timed out", "killed: memory"."""


def _receive(
    process: subprocess.Popen[bytes],
    channel: socket.socket,
    seconds: float,
    memory: int,
    most: int = 256,
) -> _Received:
    """Reads until the process ends, has sent `most` bytes, or reaches a limit."""
    data = b""
    deadline = time.monotonic() + seconds
    watch_memory = sys.platform == "darwin"  # macOS enforces no limit itself
    while len(data) < most:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return _Received(data, "timed out")
        if watch_memory and seatbelt.footprint(process.pid) > memory:
            return _Received(data, "killed: memory")
        channel.settimeout(min(remaining, 0.02) if watch_memory else remaining)
        try:
            chunk = channel.recv(most - len(data))
        except TimeoutError:
            continue
        except ConnectionError:
            break
        if not chunk:
            break
        data += chunk
    return _Received(data)


def _exit_reason(process: subprocess.Popen[bytes]) -> str:
    """Why a process closed its channel without a result."""
    try:
        status = process.wait(1)
    except subprocess.TimeoutExpired:
        return "left before its end"
    if -status in (signal.SIGXCPU, signal.SIGALRM):
        return "timed out"
    return f"killed: {signal.Signals(-status).name}" if status < 0 else "left before its end"
