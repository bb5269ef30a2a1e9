"""Results of `bench --tune`: settings that make a model faster on this chip, kept and applied.

One JSON file in the cache folder, an entry for each chip, model and version of MLX. The environment
variable MINICPM_MLX_TUNING replaces it: `off` for the defaults, or the settings as JSON.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import InvalidArgumentError
from ..files.atomic import write_whole
from ..model_cards import cache_dir

VARIABLE = "MINICPM_MLX_TUNING"
OWN_KERNELS = "MINICPM_MLX_OWN_KERNELS"
"""As of model/kernels/own.py, which is not imported: this module comes before MLX."""
FORMAT = 1
LARGEST = 1 << 20
"""Bytes of the file; more is not read."""
MOST_ENTRIES = 200
"""The oldest go first."""

DRAFT_COSTS = 16
"""Numbers in `draft_costs`, as speculative decoding drafts at most."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Settings that change a model's speed alone; the default of each is this library's own."""

    buffers: tuple[int, int] | None = None
    """Kernels and MB of a command buffer; (0, 0): as MLX has them."""
    wide: str | None = None
    """"inner" or "all"; see model/layout.py."""
    group_size: int | None = None
    own_kernels: bool = True
    prefill_chunk: int | None = None
    """Most tokens of a prompt read at once."""
    draft_costs: tuple[float, ...] = ()
    """Seconds that a pass takes longer by with 1, 2, ... draft tokens, as shares of a plain one."""

    def changed(self) -> dict[str, Any]:
        """The settings that are not the default, as JSON has them."""
        default = Tuning()
        values = {k: v for k, v in asdict(self).items() if v != getattr(default, k)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def parse(raw: Any) -> Tuning:
    """The settings of a JSON object; ValueError says what is wrong with it."""
    if not isinstance(raw, dict):
        raise ValueError(f"expected an object, got {json.dumps(raw)[:40]}")
    for name, value in raw.items():
        if name not in _VALID:
            raise ValueError(f"unknown setting {name[:40]!r}; expected {', '.join(_VALID)}")
        if value is not None and not _VALID[name](value):
            raise ValueError(f"{name}: {json.dumps(value)[:40]} is out of range")
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in raw.items() if v is not None
    }
    return Tuning(**values)


def _is_count(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _are_buffers(value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2
    if not pair or not all(_is_count(number, 0, 1_000_000) for number in value):
        return False
    return value == [0, 0] or all(value)


def _are_costs(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) in (0, DRAFT_COSTS)
        and all(type(n) in (int, float) and math.isfinite(n) and 0 < n < 1e6 for n in value)
    )


_VALID = {
    "buffers": _are_buffers,
    "wide": lambda value: value in ("inner", "all"),
    "group_size": lambda value: value in (32, 64, 128),
    "own_kernels": lambda value: isinstance(value, bool),
    "prefill_chunk": lambda value: _is_count(value, 16, 1 << 20),
    "draft_costs": _are_costs,
}
assert _VALID.keys() == {field.name for field in fields(Tuning)}


def override() -> Tuning | None:
    """The settings that the environment states; None where it states none.

    InvalidArgumentError where they are neither `off` nor valid.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    if text.lower() in ("off", "0"):
        return Tuning()
    try:
        return parse(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(
            f'{VARIABLE} must be off, or settings as JSON such as {{"wide": "inner"}}: {error}'
        ) from None


def tuning_for(chip: str, model: str, mlx: str) -> Tuning:
    """The settings to run a model with: the environment's, else those kept, else the defaults."""
    stated = override()
    return stated if stated is not None else load_tuning(chip, model, mlx) or Tuning()


def load_tuning(chip: str, model: str, mlx: str) -> Tuning | None:
    """The kept settings; None where that model (a `model_key`) was not tuned."""
    wanted = (chip, model, mlx)
    return next((tuning for key, tuning in reversed(_entries()) if key == wanted), None)


def keep_tuning(chip: str, model: str, mlx: str, tuning: Tuning) -> None:
    """Keep settings in place of those of the same chip, model and MLX; OSError if that fails."""
    key, file = (chip, model, mlx), _file()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may add an entry of its own
        entries = [*(entry for entry in _entries() if entry[0] != key), (key, tuning)]
        rows = [
            {"chip": chip, "model": model, "mlx": mlx, "settings": tuning.changed()}
            for (chip, model, mlx), tuning in entries[-MOST_ENTRIES:]
        ]
        text = json.dumps({"format": FORMAT, "entries": rows}, indent=1, ensure_ascii=False)
        write_whole(file, lambda part: part.write_text(text, encoding="utf-8"))


def kept_buffers(chip: str, mlx: str) -> tuple[int, int] | None:
    """The command buffers to start MLX with, before it is known which model runs: those that the
    environment states, else of the model that was tuned last."""
    with suppress(InvalidArgumentError):  # said when a model is loaded
        if (stated := override()) is not None:
            return stated.buffers
        for (its_chip, _, its_mlx), tuning in reversed(_entries()):
            if (its_chip, its_mlx) == (chip, mlx):
                return tuning.buffers
    return None


def model_key(config: object, folder: Path | None) -> str:
    """A hash of a model's config and of the names and sizes of its weight files."""
    digest = hashlib.sha256(f"{config!r}".encode())
    files = sorted(folder.iterdir()) if folder and folder.is_dir() else []
    for file in files:
        if file.suffix in (".safetensors", ".bin", ".gguf") and file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()[:32]


@contextmanager
def own_kernels(tuning: Tuning) -> Iterator[None]:
    """Loads a model without kernels of our own where `tuning` says so."""
    if tuning.own_kernels or OWN_KERNELS in os.environ:
        yield
        return
    os.environ[OWN_KERNELS] = "0"
    try:
        yield
    finally:
        del os.environ[OWN_KERNELS]


def _file() -> Path:
    return cache_dir() / "tuning.json"


def _entries() -> list[tuple[tuple[str, str, str], Tuning]]:
    """The kept entries, oldest first, without those that cannot be read."""
    raw: Any = None
    with suppress(OSError, ValueError, RecursionError):
        if _file().stat().st_size <= LARGEST:
            raw = json.loads(_file().read_text(encoding="utf-8"))
    if not isinstance(raw, Mapping) or raw.get("format") != FORMAT:
        return []
    rows = raw.get("entries")
    entries = []
    for row in rows if isinstance(rows, list) else []:
        with suppress(ValueError, KeyError, TypeError):
            key = (row["chip"], row["model"], row["mlx"])
            if all(isinstance(part, str) for part in key):
                entries.append((key, parse(row["settings"])))
    return entries
