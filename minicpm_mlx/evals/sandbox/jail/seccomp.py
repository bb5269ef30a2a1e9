"""seccomp: restricts a Linux process to the system calls that computing needs.

A filter is a small program in the kernel's BPF; it needs no privileges and cannot be removed:
https://docs.kernel.org/userspace-api/seccomp_filter.html
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

SET_PARENT_DEATH_SIGNAL, SET_SECCOMP, SET_NO_NEW_PRIVILEGES = 1, 22, 38
"""Options of prctl."""
FILTER = 2

LOAD, AND, EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06
"""BPF instructions: load a word, mask it, compare and jump, return."""
ALLOW, KILL = 0x7FFF0000, 0x80000000
REFUSE = 0x00050000 | errno.EPERM

NUMBER, ARCHITECTURE = 0, 4
"""Offsets in the data that a filter sees."""

MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""By architecture: the kernel's number for it, and the column of the tables below."""

NONE = -1
"""The architecture has no such call."""

PLAIN = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "lseek": (8, 62),
    "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "dup": (32, 23),
    "stat": (4, NONE), "lstat": (6, NONE), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, NONE), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, NONE), "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "mremap": (25, 216), "madvise": (28, 233), "futex": (202, 98),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128),
    "poll": (7, NONE), "ppoll": (271, 73), "select": (23, NONE), "pselect6": (270, 72),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "pause": (34, NONE),
    "alarm": (37, NONE), "getitimer": (36, 102), "setitimer": (38, 103),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169),
    "time": (201, NONE), "times": (100, 153), "getrusage": (98, 165),
    "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160),
    "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getrandom": (318, 278),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
"""Calls without effect outside the process, as (x86_64, aarch64); Landlock restricts the paths.

None creates a process, thread, socket or file, or renames a file or changes its permissions: no
rule of Landlock covers those calls."""

CHECKED = {
    "open": (2, NONE), "openat": (257, 56), "fcntl": (72, 25), "ioctl": (16, 29),
    "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261),
}  # fmt: skip
"""Calls that are harmless with some arguments."""

WRITING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
FCNTL = (0, 1, 2, 3, 1030)
"""Duplicating a file descriptor and its flags; not the owner that receives signals."""
IOCTL = (0x5401, 0x5451)
"""TCGETS (is it a terminal?) and FIOCLEX (close on exec)."""


class Check(NamedTuple):
    """A word of the filter's data, masked with `mask`, must equal `value`."""

    word: int
    mask: int
    value: int


def argument(index: int, value: int = 0, mask: int = 0xFFFFFFFF) -> Check:
    """A check of the lower half of the argument `index`, counted from 0."""
    return Check(16 + 8 * index, mask, value)


def rules(own: int) -> Iterator[tuple[str, tuple[Check, ...]]]:
    """Allowed calls, each with its checks, for the process id `own`."""
    for name in PLAIN:
        yield name, ()
    yield "open", (argument(1, mask=WRITING),)
    yield "openat", (argument(2, mask=WRITING),)
    for command in FCNTL:
        yield "fcntl", (argument(1, command),)
    for command in IOCTL:
        yield "ioctl", (argument(1, command),)
    yield "kill", (argument(0, own),)
    yield "tgkill", (argument(0, own),)
    # Limits may be read, not set: both halves of the address of new limits must be 0.
    yield "prlimit64", (argument(0), argument(2), Check(16 + 8 * 2 + 4, 0xFFFFFFFF, 0))


def assemble(machine: str, own: int) -> bytes:
    """The filter for an architecture: allows the calls of `rules`, fails all others with EPERM.

    OSError for an architecture that the tables do not have.
    """
    if machine not in MACHINES:
        raise OSError(f"expected one of the architectures {', '.join(MACHINES)}, found {machine}")
    audit_number, column = MACHINES[machine]
    calls: Mapping[str, tuple[int, int]] = PLAIN | CHECKED
    code = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, audit_number), (RETURN, 0, 0, KILL)]
    for name, checks in rules(own):
        if (number := calls[name][column]) != NONE:
            code += _allowed(number, checks)
    code.append((RETURN, 0, 0, REFUSE))
    return b"".join(
        word.to_bytes(2, "little") + bytes((true, false)) + value.to_bytes(4, "little")
        for word, true, false, value in code
    )


def _allowed(number: int, checks: tuple[Check, ...]) -> list[tuple[int, int, int, int]]:
    """Instructions that return ALLOW for one call; a failed check jumps past them."""
    code: list[tuple[int, int, int, int]] = []
    for check in (Check(NUMBER, 0xFFFFFFFF, number), *checks):
        code += [(LOAD, 0, 0, check.word), (AND, 0, 0, check.mask), (EQUAL, 0, 0, check.value)]
    code.append((RETURN, 0, 0, ALLOW))
    return [
        (word, true, len(code) - at - 1 if word == EQUAL else false, value)
        for at, (word, true, false, value) in enumerate(code)
    ]


def no_new_privileges(signal: int) -> None:
    """Prevents gaining privileges, as filters require; sends `signal` when the parent dies."""
    _prctl(SET_NO_NEW_PRIVILEGES, 1)
    _prctl(SET_PARENT_DEATH_SIGNAL, signal)


def restrict() -> None:
    """Allows this process only the system calls of the tables; OSError where that fails."""
    code = assemble(os.uname().machine, os.getpid())
    buffer = ctypes.create_string_buffer(code, len(code))
    _prctl(SET_SECCOMP, FILTER, ctypes.byref(_Program(len(code) // 8, ctypes.addressof(buffer))))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def _prctl(option: int, value: int, pointer: object = None) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    rest = (pointer if pointer is not None else ctypes.c_ulong(0), *[ctypes.c_ulong(0)] * 2)
    if library.prctl(option, ctypes.c_ulong(value), *rest):
        error = ctypes.get_errno()
        raise OSError(error, f"prctl {option}: {os.strerror(error)}")
