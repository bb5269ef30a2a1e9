"""The folder of conversations and input history, which earlier versions kept in the cache folder.

Cleaners empty cache folders and backups leave them out. What lies there is moved when the folder
is first asked for.
"""

from __future__ import annotations

import fcntl
import filecmp
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain, count
from pathlib import Path

from ..model_cards import cache_dir, data_dir

SESSIONS, HISTORY = "sessions", "history"


def user_data() -> Path:
    """The folder, which may not exist yet. The cache folder if nothing can be moved out of it."""
    return _moved(cache_dir(), data_dir())


def numbered(name: str) -> Iterator[str]:
    """The name, then variants of it."""
    return chain([name], (f"{name[:50]}-{n}" for n in count(2)))


@cache  # one answer a process: a chat must not find its session elsewhere than it was
def _moved(old: Path, new: Path) -> Path:
    if not _left_in(old, new):
        return new
    try:
        with _alone(old):
            _move(old, new)
    except OSError:  # the disk is full or may not be written to: the next start tries again
        return old
    return new


def _left_in(old: Path, new: Path) -> list[Path]:
    """Files of earlier versions. Those that cannot be read stay, and those that a link of the
    user's has in the new folder already."""
    there = {new.resolve(), (new / SESSIONS).resolve()}
    with suppress(OSError):
        found = [*sorted((old / SESSIONS).glob("*.json")), old / HISTORY]
        return [
            path
            for path in found
            if path.is_file() and path.resolve().parent not in there and os.access(path, os.R_OK)
        ]
    return []


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for another process that moves the same files; the lock ends with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network disks have no locks; moving is safe without
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _move(old: Path, new: Path) -> None:
    """Copies all, then deletes: at any moment a process that is killed leaves each file whole."""
    removable = os.access(old, os.W_OK) and os.access(old / SESSIONS, os.W_OK)
    read: dict[Path, os.stat_result] = {}
    copies: list[Path] = []
    try:
        (new / SESSIONS).mkdir(parents=True, exist_ok=True)
        for path in _left_in(old, new):
            read[path] = path.stat()
            if path.name == HISTORY:
                _append(path, new / HISTORY)
            elif copy := _copy(path, new / SESSIONS, beside=removable):
                copies.append(copy)
    except OSError:
        for copy in copies:
            copy.unlink(missing_ok=True)
        raise
    for path, stat in read.items():
        with suppress(OSError):
            now = path.stat()
            if (now.st_mtime_ns, now.st_size) == (stat.st_mtime_ns, stat.st_size):
                path.unlink()  # else an earlier version has just written it: the next start moves


def _copy(source: Path, folder: Path, *, beside: bool) -> Path | None:
    """Copies with the time of writing, under another name if it is taken and `beside` allows it.

    None if it is there already.
    """
    for name in numbered(source.stem):
        target = folder / f"{name}.json"
        try:
            _place(source, target)
        except FileExistsError:
            if not beside or filecmp.cmp(source, target, shallow=False):
                return None
        else:
            return target
    raise AssertionError  # there is always another name


def _place(source: Path, target: Path) -> None:
    """Copies to a name that must be free; no reader sees half a file."""
    if target.exists():
        raise FileExistsError
    partial = target.with_name(f".{target.name}.part")
    try:
        shutil.copy2(source, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        try:
            os.link(partial, target)  # unlike a renamed file, it replaces none
        except FileExistsError:
            raise
        except OSError:  # a disk without hard links
            partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


def _append(source: Path, target: Path) -> None:
    """Adds the lines of input to those that are there; a second time it adds none."""
    lines = source.read_bytes()
    target.touch(mode=0o600)
    if lines not in target.read_bytes():
        with target.open("ab") as file:
            file.write(lines)
            os.fsync(file.fileno())
