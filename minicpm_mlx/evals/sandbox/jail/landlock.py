"""Landlock: restricts a Linux process to reading some files.

Needs no privileges: https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""System call numbers, the same on every architecture."""
RULE_PATH_BENEATH = 1
READ_FILE, READ_DIRECTORY = 1 << 2, 1 << 3

FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Number of file access rights by version; later versions have as many as the fifth."""
TCP_RIGHTS, SCOPES = 0b11, 0b11
"""Bind and connect, from version 4; abstract sockets and signals, from version 6."""


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("files", ctypes.c_uint64),
        ("network", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def version() -> int:
    """The kernel's Landlock version; 0 where there is none."""
    return max(0, int(ctypes.CDLL(None).syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)))


def restrict(readable: Iterable[str]) -> None:
    """Lets this process open only paths at or below `readable`, and only to read.

    Open files stay open. Call `seccomp.no_new_privileges` first. OSError where the kernel has no
    Landlock, or refuses.
    """
    available = version()
    if not available:
        raise OSError("this Linux has no Landlock, which kernels have from 5.13 on")
    rules = _Ruleset(
        (1 << FILE_RIGHTS[min(available, 5)]) - 1,
        TCP_RIGHTS if available >= 4 else 0,
        SCOPES if available >= 6 else 0,
    )
    size = 8 if available < 4 else 16 if available < 6 else 24
    ruleset = _call(CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(size), 0)
    for path in readable:
        if os.path.exists(path):  # noqa: PTH110 - importing pathlib would take as long as all the rest
            _allow(ruleset, path)
    _call(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
    rule = _PathBeneath(READ_FILE | (READ_DIRECTORY if folder else 0), descriptor)
    _call(ADD_RULE, ruleset, RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    os.close(descriptor)


def _call(*arguments: object) -> int:
    library = ctypes.CDLL(None, use_errno=True)
    result = int(library.syscall(*arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"Landlock: {os.strerror(error)}")
    return result
