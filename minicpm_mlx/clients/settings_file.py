"""The settings file of a client: what would change in it, and the change itself."""

from __future__ import annotations

import difflib
import os
import shutil
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from minicpm_mlx.errors import DataError, InvalidArgumentError, StorageError
from minicpm_mlx.files.atomic import named_errors, write_whole

from . import jsonc, toml, yaml
from .merge import merge, place_of

FORMATS: dict[str, ModuleType] = {".toml": toml, ".yaml": yaml}
"""By the ending of the file; others are JSON, with or without comments."""
LARGEST = 4_000_000  # bytes of settings that a person wrote


def snippet(path: Path, settings: Any) -> str:
    """The settings alone, as the file has them."""
    return str(_format(path).update("", settings)).strip("\n")


def _format(path: Path) -> ModuleType:
    return FORMATS.get(path.suffix, jsonc)


@dataclass(frozen=True)
class Change:
    """The text of a file before and after."""

    path: Path
    before: str | None
    """None where there is no file yet."""
    after: str

    @property
    def difference(self) -> str:
        """A unified diff; empty if nothing changes."""
        before, after = (self.before or "").splitlines(), self.after.splitlines()
        name = str(self.path)
        rows = difflib.unified_diff(before, after, name, name, lineterm="")
        return "\n".join(row.rstrip("\r") for row in rows)

    def write(self, *, private: bool = False) -> Path | None:
        """Replaces the file, or the one it links to, at once; returns the copy kept of the old.

        The file keeps its mode. A new one that is `private` can be read by its owner alone.
        DataError if the file has changed since it was read.
        """
        target = Path(os.path.realpath(self.path))
        if _read(self.path) != self.before:
            raise DataError(f"{self.path}: has changed meanwhile; run the command again")
        copy = None
        with named_errors(self.path, "nothing was changed"):
            target.parent.mkdir(parents=True, exist_ok=True)
            mode = None
            if self.before is not None:
                mode = stat.S_IMODE(target.stat().st_mode)
                copy = _backup(target)
            elif private:
                mode = 0o600

            def fill(part: Path) -> None:
                part.unlink(missing_ok=True)
                part.touch(mode=0o600)
                part.write_bytes(self.after.encode())
                part.chmod(mode if mode is not None else 0o666 & ~_umask())

            write_whole(target, fill)
        return copy


def plan_change(path: Path, settings: Any, defaults: Mapping[str, Any]) -> Change:
    """Settings merged into a file, which may be missing; and `defaults` that it has not.

    DataError where it cannot be read, or cannot be changed without touching the rest of it;
    StorageError where it may not be written to.
    """
    before = _read(path)
    text = before or ""
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    format = _format(path)
    try:
        old = format.parse(text.removeprefix(mark))
    except InvalidArgumentError as error:
        raise DataError(f"{path}: cannot be read, mend it first: {error}") from None
    if old is not None and not isinstance(old, type(settings)):
        raise DataError(f"{path}: expected {_kind(settings)}, got {_kind(old)}; mend it first")
    _check_kinds(path, old, settings)
    missing = {name: value for name, value in defaults.items() if name not in (old or {})}
    settings = missing | settings if missing else settings
    wanted = settings if old is None else merge(old, settings)
    if wanted == old:
        return Change(path, before, text)
    plain = text.removeprefix(mark)
    lines = "\r\n" if "\r\n" in plain else "\n"
    try:
        after = format.update(plain.replace("\r\n", "\n"), settings)
        right = format.parse(after) == wanted
    except InvalidArgumentError:
        right = False
    if not right:
        raise DataError(
            f"{path}: is written in a way that cannot be changed safely here; paste the settings "
            "that are printed without --write"
        )
    if before is not None and not path.stat().st_mode & 0o222:
        raise StorageError(
            f"{path}: is read-only; make it writable with chmod u+w, or paste the settings that "
            "are printed without --write"
        )
    return Change(path, before, mark + after.replace("\n", lines))


def _check_kinds(path: Path, old: Any, new: Any, *names: str) -> None:
    """DataError where `new` would take the place of settings of another kind."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old.keys() & new.keys():
            _check_kinds(path, old[name], new[name], *names, name)
    elif isinstance(old, list) and isinstance(new, list):
        for item in new:
            if (at := place_of(item, old)) is not None:
                _check_kinds(path, old[at], item, *names, str(at))
    elif old and (isinstance(old, dict | list) or isinstance(new, dict | list)):
        raise DataError(
            f"{path}: {'.'.join(names)}: expected {_kind(new)}, got {_kind(old)}, which is not "
            "overwritten; mend it first"
        )


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "settings by name"
    return "a list" if isinstance(value, list) else "a single value"


def _read(path: Path) -> str | None:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path}: is no file; move it away")
        if found.st_size > LARGEST:
            raise DataError(f"{path}: is larger than settings are ({LARGEST:,} bytes at most)")
        return path.read_bytes().decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read: no UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _backup(path: Path) -> Path:
    stem = f"{path.name}.bak-{time.strftime('%Y%m%d-%H%M%S')}"
    names = [stem, *(f"{stem}-{number}" for number in range(2, 1000))]
    copy = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    shutil.copy2(path, copy)
    return copy


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
