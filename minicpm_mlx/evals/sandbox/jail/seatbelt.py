"""The profile that macOS's sandbox-exec holds a program to: Python may start, and read itself."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

SANDBOX_EXEC = "/usr/bin/sandbox-exec"

PROFILE = """\
(version 1)
(deny default)
; What any process needs so as to start: the system's own libraries, and questions about itself.
(import "system.sb")
(allow sysctl-read)
(allow process-info* (target self))
(allow signal (target self))
(allow file-read-metadata)
; The last rule that fits counts, so these take back what the import may have given.
(deny network*)
(deny process-fork)
(deny file-write*)
(deny file-read* (subpath "/private/etc"))
(allow file-read* file-map-executable {readable})
(allow process-exec {python})
"""


def command(python: Sequence[str], readable: Iterable[str], home: str) -> list[str]:
    """`python`, a command line, as one that runs under the profile.

    The process reads what is at or below `readable`, and executes what is below `home` alone: a
    framework's interpreter starts another one that is there.
    """
    interpreter = [python[0], os.path.realpath(python[0])]
    places = " ".join(f"(subpath {_quoted(path)})" for path in _real(readable))
    runs = " ".join(f"(literal {_quoted(path)})" for path in dict.fromkeys(interpreter))
    runs += "".join(f" (subpath {_quoted(path)})" for path in _real([home]))
    profile = PROFILE.format(readable=f"{places} {runs}", python=runs)
    return [SANDBOX_EXEC, "-p", profile, *python]


def _real(paths: Iterable[str]) -> list[str]:
    """Each path that exists, as it is written and without links, which is how it is compared."""
    found = [path for path in paths if Path(path).exists()]
    return list(dict.fromkeys([*found, *map(os.path.realpath, found)]))


def _quoted(path: str) -> str:
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


class _Usage(ctypes.Structure):
    """`rusage_info_v0` of macOS's sys/resource.h."""

    _fields_ = (
        ("uuid", ctypes.c_uint8 * 16),
        ("times_and_wakeups", ctypes.c_uint64 * 4),
        ("pageins", ctypes.c_uint64),
        ("wired", ctypes.c_uint64),
        ("resident", ctypes.c_uint64),
        ("footprint", ctypes.c_uint64),
        ("started_and_exited", ctypes.c_uint64 * 2),
    )


def footprint(process: int) -> int:
    """Bytes of memory that a process of this user takes up; 0 once it has ended.

    macOS keeps no limit on a process's memory, so it must be watched from outside.
    """
    usage = _Usage()
    library = ctypes.CDLL("/usr/lib/libproc.dylib")
    failed = library.proc_pid_rusage(process, 0, ctypes.byref(usage))
    return 0 if failed else int(usage.footprint)
