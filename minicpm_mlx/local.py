"""A card to a folder on this disk: downloaded, converted or quantized once, and kept."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .errors import DownloadError, InvalidArgumentError
from .registry import Card, cache_dir


def folder_of(card: Card, *, progress: bool = True) -> Path:
    """The folder that holds the card's model, after whatever is needed to have it.

    A repository is downloaded to the hub's cache; the demo is converted, and a card with `bits`
    quantized, to this library's. Raises ModelNotFoundError or DownloadError.
    """
    if card.path is not None:
        if card.path.is_file():
            raise InvalidArgumentError(
                f"{card.path}: GGUF files cannot be loaded yet; expected a folder with config.json "
                "and weights"
            )
        return card.path
    if card.package is not None:
        from . import demo

        return _kept(demo.stamp(card), lambda folder: demo.convert(demo.source(card), folder))
    return _from_hub(card, progress)


def kept_folder(card: Card) -> Path | None:
    """The same folder if it is already there; touches no network and makes nothing."""
    if card.path is not None:
        return card.path
    if card.package is not None:
        found = cache_dir().glob(f"{card.name}-v*")
        return max(found, key=lambda folder: folder.stat().st_mtime, default=None)
    if card.bits is not None:
        folder = cache_dir() / _quantized_name(card)
        return folder if (folder / "config.json").is_file() else None
    from . import hub

    return hub.cached(str(card.repo), card.revision, weights=card.file)


def made_folders(card: Card) -> list[Path]:
    """What this library made of the card's model and keeps: conversions, quantized copies.

    What a process left half made when it was killed is among them.
    """
    made = re.compile(rf"{re.escape(card.name)}-(v\d+-[0-9a-f]+|\d+bit-g\d+)")
    half = re.compile(rf"\.{made.pattern}-\w+")
    found = sorted(cache_dir().glob("*"))
    return [path for path in found if made.fullmatch(path.name) or half.fullmatch(path.name)]


def _from_hub(card: Card, progress: bool) -> Path:
    kept = cache_dir() / _quantized_name(card)
    if card.bits is not None and (kept / "config.json").is_file():
        return kept
    from . import hub

    try:
        source = hub.fetch(str(card.repo), card.revision, weights=card.file, progress=progress)
    except DownloadError as error:
        raise DownloadError(f"{error}; to try the program without it: --model demo") from None
    if card.bits is None:
        return source
    return _kept(_quantized_name(card), lambda folder: _packed(source, card, folder))


def _quantized_name(card: Card) -> str:
    return f"{card.name}-{card.bits}bit-g{card.group_size}"


def _packed(source: Path, card: Card, folder: Path) -> None:
    from .config_parts import Quantization
    from .quantized import write_quantized

    packing = Quantization(bits=card.bits or 4, group_size=card.group_size or 64)
    write_quantized(source, folder, packing, weights=card.file)


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    """The cache's folder `name`; where it is missing, `make` fills it, wholly or not at all."""
    folder = cache_dir() / name
    if (folder / "config.json").is_file():
        return folder
    _sweep(name)
    make_whole(folder, make, "set MINICPM_MLX_HOME to a folder with room that you may write to")
    return folder


def make_whole(folder: Path, make: Callable[[Path], None], advice: str) -> None:
    """Have `make` fill a folder beside `folder`, which then takes its place, wholly or not at all.

    DownloadError, with `advice`, where it cannot be written.
    """
    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        make(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            if not (folder / "config.json").is_file():  # damaged; else another was faster
                shutil.rmtree(folder)
                partial.rename(folder)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "[write]" not in str(error):
            raise  # MLX's word for a disk that is full
        full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
        room = "free some space, or " if full else ""
        raise DownloadError(
            f"{folder}: cannot be written ({getattr(error, 'strerror', None) or error}); {room}"
            f"{advice}"
        ) from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _sweep(name: str) -> None:
    """Delete what processes that were killed left half made of the cache's folder `name`."""
    for half in cache_dir().glob(f".{name}-*"):
        if time.time() - half.stat().st_mtime > 24 * 3600:  # else another may be at it
            shutil.rmtree(half, ignore_errors=True)
