"""The cache of downloads: huggingface_hub's own, so other tools share it.

HF_HOME and HF_HUB_CACHE mean what they mean there. Both sources fill it in its documented layout:
huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

from ...errors import ModelNotFoundError, StorageError
from ...files.weight_files import files_in
from ..network import proxies
from .gguf_files import choose_gguf, fits, gguf_models

Files = Mapping[str, tuple[int, str]]
"""Bytes of files and names of their blobs in the cache, by file name."""

_TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer*",
    "chat_template*",
)


def cached(
    repo: str, revision: str = "main", *, weights: str | None = None, tag: str | None = None
) -> Path | None:
    """The kept folder of `repo` at `revision` if it is complete; never touches the network.

    `weights` names a weight file that has no standard name. Of a GGUF repository, the kept file
    that `tag` chooses, or without one the best of those kept.
    """
    if not is_revision(revision):
        return None
    folder = snapshot(repo, revision)
    if tag is None and is_complete(folder, weights):
        return folder
    sizes = {name: (folder / name).stat().st_size for name in gguf_models(names_in(folder))}
    if weights or not sizes:
        return None
    try:
        return folder / choose_gguf(repo, sizes, tag)
    except ModelNotFoundError:
        return None


def is_revision(revision: str) -> bool:
    """Whether a branch, tag or commit can be called so; else it would be a path elsewhere."""
    return not {"", ".", ".."} & set(revision.split("/"))


def snapshot(repo: str, revision: str) -> Path:
    """The folder where `repo` at `revision` is kept, if it is."""
    ref = repository(repo) / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    return repository(repo) / "snapshots" / commit


def kept_repositories() -> Iterator[tuple[str, Path]]:
    """Every repository that is kept complete, with its folder, in the order of names; one kept at
    another revision than main alone as `org/name@revision`."""
    for kept in sorted(root().glob("models--*--*")):
        repo = kept.name.removeprefix("models--").replace("--", "/", 1)
        refs = sorted(path for path in (kept / "refs").rglob("*") if path.is_file())
        names = [path.relative_to(kept / "refs").as_posix() for path in refs]
        commits = [path.name for path in sorted(kept.glob("snapshots/*"))]
        for revision in sorted({*names, *commits}, key=lambda name: name != "main"):
            if is_complete(folder := snapshot(repo, revision), None):
                yield repo if revision == "main" else f"{repo}@{revision}", folder
                break


def cached_size(repo: str, tag: str | None = None) -> int:
    """Bytes kept of `repo`, all revisions and unfinished files together; with a `tag`, of the
    .gguf files that it chooses."""
    blobs = repository(repo).glob("blobs/*")
    if tag is not None:
        blobs = (blob for blob in {link.resolve() for link in _links(repo, tag)})
    return sum(file.stat().st_size for file in blobs if file.is_file())


def remove(repo: str, tag: str | None = None) -> int:
    """Delete every kept revision of `repo`, or of the .gguf files that `tag` chooses; the bytes
    freed, 0 if none was kept."""
    size = cached_size(repo)
    if not repository(repo).is_dir():
        return 0
    try:
        if tag is not None and _links(repo, tag) != _links(repo):
            _remove_files(repo, tag)
            return size - cached_size(repo)
        from huggingface_hub import scan_cache_dir

        kept = scan_cache_dir(root())
        ours = {r for r in kept.repos if (r.repo_type, r.repo_id) == ("model", repo)}
        commits = [revision.commit_hash for r in ours for revision in r.revisions]
        # Of these alone: a mirror in the same cache has the same commits.
        replace(kept, repos=frozenset(ours)).delete_revisions(*commits).execute()
        # An interrupted first download has no revision for the line above to delete.
        shutil.rmtree(repository(repo), ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{repo} could not be removed from {root()}: {error}") from error
    return size - cached_size(repo)


def _links(repo: str, tag: str | None = None) -> list[Path]:
    """The kept files of all snapshots; with a `tag`, the .gguf files that it chooses."""
    links = sorted(repository(repo).glob("snapshots/*/*"))
    return [
        link for link in links if tag is None or (gguf_models([link.name]) and fits(tag, link.name))
    ]


def _remove_files(repo: str, tag: str) -> None:
    gone = _links(repo, tag)
    blobs = {link.resolve() for link in gone}
    for link in gone:
        link.unlink()
    for blob in blobs - {link.resolve() for link in _links(repo)}:
        blob.unlink(missing_ok=True)


def is_complete(folder: Path, weights: str | None) -> bool:
    """Whether every file that loading needs is there; a link to a missing blob is not."""
    try:
        names = names_in(folder)
        if not has_texts(names):
            return False
        if weights:
            return weights in names
        found = files_in(folder)
    except (OSError, ValueError):
        return False
    return found is not None and found.missing is None


def names_in(folder: Path) -> set[str]:
    """The names of files in `folder`, without links to what is not there."""
    return {file.name for file in folder.iterdir() if file.exists()} if folder.is_dir() else set()


def has_texts(names: set[str]) -> bool:
    """Whether a config and a tokenizer are among files of these names."""
    return "config.json" in names and bool({"tokenizer.json", "tokenizer.model"} & names)


def is_text(name: str) -> bool:
    """Whether a file of this name belongs to the config, the tokenizer or the chat template."""
    return any(fnmatchcase(name, pattern) for pattern in _TEXT_FILES)


def check_disk(repo: str, files: Files) -> None:
    """StorageError where the disk has no room for those of `files` that are not kept."""
    blobs = repository(repo) / "blobs"
    need = sum(size for size, blob in files.values() if not (blob and (blobs / blob).is_file()))
    disk = next(path for path in [root(), *root().parents] if path.exists())
    free = shutil.disk_usage(disk).free
    if free < need:
        raise StorageError(
            f"{repo}: expected {_gb(need)} of free disk, found {_gb(free)} at {disk}; "
            "free some, or set HF_HOME to a larger disk"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def constants() -> ModuleType:
    """huggingface_hub's settings, read from the environment when it is imported first."""
    # Without it, 2.x asks its endpoint for a list of agents to name in the User-Agent: nothing
    # phones home.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if any(address.startswith("socks") for address in proxies().values()):
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # hf_xet knows no socks5h
    from huggingface_hub import constants

    return constants


def root() -> Path:
    """The folder of the cache."""
    return Path(constants().HF_HUB_CACHE)


def repository(repo: str) -> Path:
    """The folder of all that is kept of `repo`."""
    return root() / f"models--{repo.replace('/', '--')}"


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Shows huggingface_hub's progress bars meanwhile, or does not."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
