"""A card to a folder on this disk: downloaded, converted or quantized once, and kept."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import DownloadError, InvalidArgumentError, WeightsError
from ..files.atomic import make_whole
from ..model_cards import Card, cache_dir

GGUF_VERSION = 1
"""Raised when the conversion of .gguf files changes, so that kept ones are made anew."""


def folder_of(card: Card, *, progress: bool = True) -> Path:
    """The folder that holds the card's model, after whatever is needed to have it.

    A repository is downloaded to the hub's cache; the demo and .gguf files are converted, and a
    card with `bits` quantized, to this library's. Raises ModelNotFoundError, DownloadError
    or StorageError.
    """
    if card.path is not None:
        return _from_gguf(card) if card.path.is_file() else card.path
    if card.package is not None:
        from . import demo

        return _kept(demo.stamp(card), lambda folder: demo.convert(demo.source(card), folder))
    return _from_hub(card, progress)


def text_folder_of(card: Card, *, progress: bool = True) -> Path:
    """The folder of the card's config and tokenizer; a repository's weights are not downloaded.

    The config is that of the model before it is quantized, if nothing is kept. Raises as
    `folder_of` does.
    """
    if card.path is not None or card.package is not None or kept_folder(card) is not None:
        return folder_of(card, progress=progress)
    from . import download

    with _advised():
        found = download.fetch_texts(
            str(card.repo), card.revision, weights=card.file, tag=card.tag, progress=progress
        )
    return _from_gguf(_file_card(found), _file_name(card, found)) if found.is_file() else found


@contextmanager
def _advised() -> Iterator[None]:
    try:
        yield
    except DownloadError as error:
        raise DownloadError(f"{error}; to try the program without it: --model demo") from None


def kept_folder(card: Card) -> Path | None:
    """The same folder if it is already there; touches no network and makes nothing."""
    if card.path is not None and card.path.is_file():
        folder = cache_dir() / _converted_name(card)
        return folder if (folder / "config.json").is_file() else None
    if card.path is not None:
        return card.path
    if card.package is not None:
        found = cache_dir().glob(f"{card.name}-v*")
        return max(found, key=lambda folder: folder.stat().st_mtime, default=None)
    if card.bits is not None:
        folder = cache_dir() / _quantized_name(card)
        return folder if (folder / "config.json").is_file() else None
    from . import download

    kept = download.cached(str(card.repo), card.revision, weights=card.file, tag=card.tag)
    return kept_folder(_file_card(kept)) if kept and kept.is_file() else kept


def is_kept(card: Card) -> bool:
    """Whether the model needs no download."""
    if card.repo is None or kept_folder(card) is not None:
        return True
    from . import download

    kept = download.cached(str(card.repo), card.revision, weights=card.file, tag=card.tag)
    return kept is not None


def _file_card(file: Path) -> Card:
    return Card(name=file.stem, path=file)


def _file_name(card: Card, file: Path) -> str:
    """What `resolve` finds this file of the card's repository by."""
    from . import download

    at = "" if card.revision == "main" else f"@{card.revision}"
    return f"{card.repo}{at}:{download.tag_of(file.name, [file.name])}"


def made_folders(card: Card) -> list[Path]:
    """Kept folders made from the card's model: conversions, quantized copies, unfinished ones."""
    kinds = r"v\d+-[0-9a-f]+|\d+bit-g\d+(-mixed|-exact)?"
    if card.path is not None:
        kinds = rf"gguf-{_short_hash(card.path.resolve())}-[0-9a-f]{{8}}"
    made = re.compile(rf"{re.escape(card.name)}-({kinds})")
    half = re.compile(rf"\.{made.pattern}-\w+")
    found = sorted(cache_dir().glob("*"))
    folders = [path for path in found if made.fullmatch(path.name) or half.fullmatch(path.name)]
    if card.repo is None:
        return folders
    return [*folders, *(copy.folder for copy in kept_copies() if _is_of(copy, card))]


def _is_of(copy: KeptCopy, card: Card) -> bool:
    """Whether a copy was converted from the card's .gguf file, or from one of its repository."""
    from . import download

    repo = re.split("[@:]", copy.model or "")[0]
    if repo.lower() != str(card.repo).lower() or copy.source is None:
        return False
    return card.tag is None or download.fits(card.tag, copy.source.name)


SOURCE = "source.json"
"""In a folder converted from a .gguf file: where that file was, and its name in a repository."""

COPY = re.compile(
    r"\.?(.+)-(gguf-[0-9a-f]{8}-[0-9a-f]{8}|v\d+-[0-9a-f]+|\d+bit-g\d+(?:-mixed|-exact)?)(-\w+)?"
)


@dataclass(frozen=True, kw_only=True)
class KeptCopy:
    """A folder that this library made of a model and keeps in its cache."""

    folder: Path
    kind: str
    """"converted", "quantized" or "unfinished"."""
    source: Path | None
    """The .gguf file it was made from, which may be gone; None: none, or unknown."""
    model: str | None = None
    """The name of that file in a repository, as `--model` takes it; None: it is in none."""

    @property
    def name(self) -> str:
        """What `rm` takes."""
        return self.model or str(self.source or self.folder.name)


def kept_copies() -> list[KeptCopy]:
    """Every folder that was made of a model, in the order of names."""
    copies = []
    for folder in sorted(cache_dir().glob("*")):
        if (match := COPY.fullmatch(folder.name)) and folder.is_dir():
            kind = "quantized" if "bit-g" in match[2] else "converted"
            if folder.name.startswith("."):
                kind = "unfinished"
            source, model = _source(folder)
            copies.append(KeptCopy(folder=folder, kind=kind, source=source, model=model))
    return copies


def _source(folder: Path) -> tuple[Path | None, str | None]:
    with suppress(OSError, ValueError, LookupError, TypeError):
        known = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
        model = known.get("model")
        return Path(known["file"]), model if isinstance(model, str) else None
    return None, None


def _from_hub(card: Card, progress: bool) -> Path:
    kept = cache_dir() / _quantized_name(card)
    if card.bits is not None and (kept / "config.json").is_file():
        return kept
    from . import download

    with _advised():
        source = download.fetch(
            str(card.repo), card.revision, weights=card.file, tag=card.tag, progress=progress
        )
    if source.is_file():
        source = _from_gguf(_file_card(source), _file_name(card, source))
    if card.bits is None:
        return source
    return _kept(
        _quantized_name(card),
        lambda folder: _packed(source, card, folder, progress),
        resume=card.method != "exact",  # which takes seconds
    )


def _from_gguf(card: Card, model: str | None = None) -> Path:
    """The folder that a .gguf file was converted to; those of an older such file are deleted.

    `model` is the file's name in a repository.
    """
    from ..weights.checkpoint import write_json
    from ..weights.gguf import convert_gguf

    file = card.path
    assert file is not None

    def make(folder: Path) -> None:
        convert_gguf(file, folder)
        write_json(folder / SOURCE, {"file": str(file)} | ({"model": model} if model else {}))

    folder = _kept(_converted_name(card), make)
    for older in made_folders(card):
        if older != folder and not older.name.startswith("."):
            shutil.rmtree(older, ignore_errors=True)
    return folder


def _converted_name(card: Card) -> str:
    """A name that changes with the file's place, its size and its time, and the conversion."""
    assert card.path is not None
    stat = card.path.stat()
    content = _short_hash(GGUF_VERSION, stat.st_size, stat.st_mtime_ns)
    return f"{card.name}-gguf-{_short_hash(card.path.resolve())}-{content}"


def _short_hash(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode(errors="replace")).hexdigest()[:8]


def _quantized_name(card: Card) -> str:
    return f"{card.name}-{card.bits}bit-g{card.group_size}-{card.method or 'mixed'}"


def _packed(source: Path, card: Card, folder: Path, progress: bool) -> None:
    from ..quantization.recipe import Recipe, packing
    from ..quantization.write import write_quantized

    def tell(what: str) -> None:
        if progress and sys.stderr is not None and sys.stderr.isatty():
            print(f"\r\x1b[2K{card.name}, once: {what}", end="", file=sys.stderr, flush=True)

    recipe = (
        Recipe(method="exact")
        if card.method == "exact"
        else Recipe(packing=packing(card.bits, card.group_size))
    )
    try:
        write_quantized(source, folder, recipe, card, progress=tell)
    except InvalidArgumentError as error:
        if card.method != "exact":
            raise
        raise WeightsError(f"{card.repo}: {error}: --model {card.repo}") from None


def _kept(name: str, make: Callable[[Path], object], *, resume: bool = False) -> Path:
    """The cache's folder `name`; where it is missing, `make` fills it, wholly or not at all."""
    folder = cache_dir() / name
    if (folder / "config.json").is_file():
        return folder
    advice = "set MINICPM_MLX_HOME to a folder with room that you may write to"
    make_whole(folder, make, advice, resume=resume)
    return folder
