"""Writes files and folders atomically, and names the errors of writing."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import DataError, StorageError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` write a file beside `path` that replaces it once it is complete and on disk.

    The file has the same suffix. If the process is killed, it stays, and the next call overwrites
    it.
    """
    part = path.with_name(f"part-{path.name}")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def named_errors(path: Path, advice: str) -> Iterator[None]:
    """Raises StorageError, with `advice`, for whatever the system or MLX says of a full disk, or
    of one that may not be written to."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "[write]" not in str(error):
            raise  # MLX's word for a disk that is full
        # NumPy's tofile raises an OSError without a number when the disk is full.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, None)
        room = "free some space, or " if full else ""
        raise StorageError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}); {room}"
            f"{advice}"
        ) from None


def check_writable(path: Path, advice: str) -> None:
    """Raises StorageError, with `advice`, where `path`, which does not exist, cannot be made."""
    with named_errors(path, advice):
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=parent)).rmdir()


PARTIAL = "-partial"
"""Suffix of the name of a folder that can be resumed."""


def make_whole(
    folder: Path, make: Callable[[Path], object], advice: str, *, resume: bool = False
) -> None:
    """Have `make` fill a folder beside `folder`, which is then renamed to it: all or nothing.

    With `resume`, an interrupted `make` leaves its files for the next call to continue from.
    StorageError, with `advice`, where it cannot be written, or another process is making it.
    """
    with named_errors(folder, advice):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if resume:
            partial = partial_of(folder)
            partial.mkdir(exist_ok=True)
        else:
            _sweep(folder)
            partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        with alone(partial, folder):  # only the process that fills it may rename or delete it
            try:
                make(partial)
                partial.chmod(0o777 & ~_umask())  # mkdtemp's are its owner's alone
                _take_place(partial, folder)
            finally:
                begun = resume and partial.is_dir() and any(partial.iterdir())
                if not begun:
                    shutil.rmtree(partial, ignore_errors=True)


def partial_of(folder: Path) -> Path:
    """The folder that `make_whole` fills for `folder` with `resume`."""
    return folder.parent / f".{folder.name}{PARTIAL}"


def _take_place(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        if not (folder / "config.json").is_file():  # damaged; else another process was faster
            shutil.rmtree(folder)
            partial.rename(folder)


@contextmanager
def alone(locked: Path, folder: Path) -> Iterator[None]:
    """Keeps a second process from filling `folder`, by a lock on the folder `locked`, which ends
    with the process. StorageError: another has it."""
    handle = os.open(locked, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(
                f"{folder}: another process is making it; wait for it, or end it"
            ) from None
        yield
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sweep(folder: Path) -> None:
    """Delete unfinished folders that killed processes left."""
    for partial in folder.parent.glob(f".{folder.name}-????????"):
        # A folder in use is locked, or is about to be.
        with suppress(StorageError, OSError), alone(partial, folder):
            if time.time() - partial.stat().st_mtime > 60:
                shutil.rmtree(partial, ignore_errors=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    return digest.hexdigest()
