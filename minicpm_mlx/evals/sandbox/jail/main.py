"""The process's main function: sets limits, locks the process in and runs the program."""

from __future__ import annotations

import os
import resource
import signal
import sys
from types import ModuleType

from . import landlock, seccomp

READY = b"ready\n"


def run() -> None:
    """Reads a program from the channel, runs it locked in, and reports there how it ended.

    Arguments of the process: the channel's file descriptor, bytes of the program, limits of
    seconds and of bytes of memory, then the paths that Python itself must read.
    """
    channel, length, seconds, memory = (int(word) for word in sys.argv[1:5])
    readable = sys.argv[5:]
    program = _read_exactly(channel, length)
    try:
        _set_limits(seconds, memory)
        _lock_in(readable)
    except (OSError, ValueError) as error:
        os.write(channel, f"refused: {error}".encode()[:400])
        os._exit(1)
    _remove_traces()
    os.write(channel, READY)
    _run(channel, program.decode("utf-8", "surrogatepass"))


def _read_exactly(channel: int, length: int) -> bytes:
    parts: list[bytes] = []
    while length:
        parts.append(os.read(channel, length))
        if not parts[-1]:
            os._exit(1)  # the parent is gone
        length -= len(parts[-1])
    return b"".join(parts)


def _set_limits(seconds: int, memory: int) -> None:
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
    ):
        if sys.platform == "darwin" and kind == resource.RLIMIT_AS:
            continue  # macOS ignores it: the parent watches
        hard = resource.getrlimit(kind)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))
    # In case the parent dies first: a sleeping program uses no CPU time.
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)


def _lock_in(readable: list[str]) -> None:
    if sys.platform == "linux":  # elsewhere the parent started this process in its sandbox
        seccomp.no_new_privileges(signal.SIGKILL)
        landlock.restrict(readable)
        seccomp.restrict()


def _remove_traces() -> None:
    """Removes our modules, arguments and paths before the program runs."""
    sys.argv[:] = ["program"]
    sys.path[:] = sys.path[1:-1]  # Python put its folder first, and the parent this code's last
    os.environ.clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "jail"]:
        del sys.modules[name]


def _run(channel: int, program: str) -> None:
    """Runs the program and exits.

    The parent accepts only its own token as success. It is read after the program's last line, and
    sent back reversed so that a blind copy does not pass.
    """
    read, write, leave = os.read, os.write, os._exit  # before the program can replace them
    # Not "__main__": UltraEval runs no `if __name__ == "__main__"` block either.
    module = ModuleType("program")
    sys.modules["program"] = sys.modules["__main__"] = module
    try:
        exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        write(channel, f"failed: {type(error).__name__}".encode()[:200])
        leave(1)
    write(channel, read(channel, 64)[::-1])
    leave(0)
