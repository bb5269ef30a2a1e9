"""What runs in the process: bounds are set, the doors shut, and the program run to its end."""

from __future__ import annotations

import os
import resource
import signal
import sys
from types import ModuleType

from . import landlock, seccomp

READY = b"ready\n"


def run() -> None:
    """Take a program from the channel, run it shut in, and say there how it ended.

    The arguments of the process: the number of the channel, bytes of the program, seconds and
    bytes of memory it may use, then the paths that Python itself must read.
    """
    channel, length, seconds, memory = (int(word) for word in sys.argv[1:5])
    readable = sys.argv[5:]
    program = _exactly(channel, length)
    try:
        _bound(seconds, memory)
        _shut(readable)
    except (OSError, ValueError) as error:
        os.write(channel, f"refused: {error}".encode()[:400])
        os._exit(1)
    _forget()
    os.write(channel, READY)
    _run(channel, program.decode("utf-8", "surrogatepass"))


def _exactly(channel: int, length: int) -> bytes:
    parts: list[bytes] = []
    while length:
        parts.append(os.read(channel, length))
        if not parts[-1]:
            os._exit(1)  # the parent is gone
        length -= len(parts[-1])
    return b"".join(parts)


def _bound(seconds: int, memory: int) -> None:
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
    ):
        if sys.platform == "darwin" and kind == resource.RLIMIT_AS:
            continue  # not kept there: the parent watches
        hard = resource.getrlimit(kind)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))
    # Should the parent die first: a program that sleeps uses no time of the processor.
    signal.setitimer(signal.ITIMER_REAL, seconds + 1)


def _shut(readable: list[str]) -> None:
    if sys.platform == "linux":  # elsewhere the parent started this process shut in
        seccomp.no_new_privileges(signal.SIGKILL)
        landlock.restrict(readable)
        seccomp.restrict()


def _forget() -> None:
    """Leave the program nothing of ours to come upon."""
    sys.argv[:] = ["program"]
    sys.path[:] = sys.path[1:-1]  # Python put its folder first, and the parent this code's last
    os.environ.clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "jail"]:
        del sys.modules[name]


def _run(channel: int, program: str) -> None:
    """Run it and leave. The parent's token, unread until the last line has run, is the only thing
    that it takes for success; it goes back turned round, so that no blind copy of it passes."""
    read, write, leave = os.read, os.write, os._exit  # before the program can put others there
    # Not "__main__": the harness that this follows ran no block under that name either.
    module = ModuleType("program")
    sys.modules["program"] = sys.modules["__main__"] = module
    try:
        exec(compile(program, "<program>", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        write(channel, f"failed: {type(error).__name__}".encode()[:200])
        leave(1)
    write(channel, read(channel, 64)[::-1])
    leave(0)
