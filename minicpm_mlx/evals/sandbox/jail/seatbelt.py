"""macOS's sandbox-exec: a profile in which Python can only start and read its own files."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

SANDBOX_EXEC = "/usr/bin/sandbox-exec"

PROFILE = """\
(version 1)
(deny default)
; Needed by any process to start: the system's libraries, information about itself.
(import "system.sb")
(allow sysctl-read)
(allow process-info* (target self))
(allow signal (target self))
(allow file-read-metadata)
; The last matching rule counts: these revoke what the import may have allowed.
(deny network*)
(deny process-fork)
(deny file-write*)
(deny file-read* (subpath "/private/etc"))
(allow file-read* file-map-executable {readable})
(allow process-exec {python})
"""


def command(python: Sequence[str], readable: Iterable[str], home: str) -> list[str]:
    """The command line `python`, run under the profile.

    The process reads only paths at or below `readable`, and executes only files below `home`: a
    framework's interpreter starts another one there.
    """
    interpreter = [python[0], os.path.realpath(python[0])]
    readable_rules = " ".join(f"(subpath {_quoted(path)})" for path in _real(readable))
    executable_rules = " ".join(f"(literal {_quoted(path)})" for path in dict.fromkeys(interpreter))
    executable_rules += "".join(f" (subpath {_quoted(path)})" for path in _real([home]))
    profile = PROFILE.format(
        readable=f"{readable_rules} {executable_rules}", python=executable_rules
    )
    return [SANDBOX_EXEC, "-p", profile, *python]


def _real(paths: Iterable[str]) -> list[str]:
    """Existing paths as written and with links resolved, as macOS compares them."""
    existing = [path for path in paths if Path(path).exists()]
    return list(dict.fromkeys([*existing, *map(os.path.realpath, existing)]))


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
    """Bytes of memory of a process of this user; 0 once it has ended.

    macOS enforces no limit on a process's memory, so the parent watches it.
    """
    usage = _Usage()
    library = ctypes.CDLL("/usr/lib/libproc.dylib")
    failed = library.proc_pid_rusage(process, 0, ctypes.byref(usage))
    return 0 if failed else int(usage.footprint)
