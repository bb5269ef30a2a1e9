"""Downloads from a hub: one repository, only the files this library reads.

Files lie in huggingface_hub's own cache, so other tools share them. HF_ENDPOINT (a mirror),
HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and HF_TOKEN mean what they mean there. This is the only
module that imports huggingface_hub, and looking at what is kept imports none of its network code.
"""

import errno
import glob
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import ModuleType

from ..arguments import printable
from ..errors import (
    DownloadError,
    MiniCPMError,
    ModelNotFoundError,
    StorageError,
)
from ..files.weight_files import WeightFiles, choose_weight_files, files_in
from .network import check_settings, endpoint, proxies

_TIMEOUT = 20.0  # seconds; huggingface_hub's listing has none and would hang behind a firewall
_TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer*",
    "chat_template*",
)


def fetch(
    repo: str,
    revision: str = "main",
    *,
    weights: str | None = None,
    offline_ok: bool = True,
    progress: bool = True,
) -> Path:
    """The folder of `repo` at `revision`, downloaded if it is not kept already.

    With `offline_ok` a kept copy is returned without touching the network; without it the hub is
    asked for a newer one. `weights` names a weight file that has no standard name. Progress goes to
    stderr. Raises DownloadError or ModelNotFoundError; a call that failed may be repeated, and
    files that were finished are not downloaded again.
    """
    if offline_ok and (kept := cached(repo, revision, weights=weights)):
        return kept
    folder = _download(repo, revision, _remote_files(repo, revision, weights), progress)
    if not _complete(folder, weights):
        raise DownloadError(
            f"{repo}: expected every weight file its index names, found some missing; "
            "run it again, or download another revision"
        )
    return folder


def fetch_texts(
    repo: str, revision: str = "main", *, weights: str | None = None, progress: bool = True
) -> Path:
    """The folder with the config and the tokenizer of `repo`; its weights are not downloaded.

    A complete copy is returned without touching the network, and kept texts alone if the hub cannot
    be reached. Raises as `fetch` does, also for a repository without weights.
    """
    if kept := cached(repo, revision, weights=weights):
        return kept
    try:
        files = _remote_files(repo, revision, weights)
    except DownloadError:
        if _has_texts(_names(kept_texts := _snapshot(repo, revision))):
            return kept_texts
        raise
    return _download(repo, revision, {n: files[n] for n in files if _is_text(n)}, progress)


def _download(repo: str, revision: str, files: dict[str, tuple[int, str]], progress: bool) -> Path:
    _check_disk(repo, files)
    with _explained(repo, revision, "download"), _bars(progress):
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[glob.escape(name) for name in files],
                cache_dir=_cache(),
                endpoint=endpoint(),
            )
        )


def fetch_data(
    repo: str, files: Sequence[str], revision: str = "main", *, progress: bool = True
) -> Path:
    """The folder of the data set `repo` with these files, downloaded where they are not kept.

    With all of them kept, the network is not touched. Raises as `fetch` does, and DownloadError for
    a file that the repository does not have.
    """
    if not (offline := _constants().HF_HUB_OFFLINE):
        check_settings()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    fetch = partial(
        snapshot_download,
        repo,
        repo_type="dataset",
        revision=revision,
        allow_patterns=[glob.escape(name) for name in files],
        cache_dir=_cache(),
        endpoint=endpoint(),
    )
    with suppress(LocalEntryNotFoundError):
        kept = Path(fetch(local_files_only=True))
        if all((kept / name).is_file() for name in files):
            return kept
    with _explained(repo, revision, "download"), _bars(progress):
        if offline:
            raise OfflineModeIsEnabled
        folder = Path(fetch())
    if lacking := [name for name in files if not (folder / name).is_file()]:
        raise DownloadError(
            f"{repo} has no file {lacking[0]} at {revision}; download the set another way and give "
            "its folder"
        )
    return folder


def cached(repo: str, revision: str = "main", *, weights: str | None = None) -> Path | None:
    """The kept folder of `repo` at `revision` if it is complete; never touches the network."""
    if ".." in revision.split("/"):
        return None
    folder = _snapshot(repo, revision)
    return folder if _complete(folder, weights) else None


def _snapshot(repo: str, revision: str) -> Path:
    """The folder where `repo` at `revision` is kept, if it is."""
    ref = _folder(repo) / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    return _folder(repo) / "snapshots" / commit


def cached_size(repo: str) -> int:
    """Bytes kept of `repo`, all revisions and unfinished files together."""
    return sum(file.stat().st_size for file in _folder(repo).glob("blobs/*") if file.is_file())


def remove(repo: str) -> int:
    """Delete every kept revision of `repo`; the bytes freed, 0 if none was kept."""
    size = cached_size(repo)
    if not _folder(repo).is_dir():
        return 0
    try:
        from huggingface_hub import scan_cache_dir

        kept = scan_cache_dir(_cache())
        ours = [r for r in kept.repos if (r.repo_type, r.repo_id) == ("model", repo)]
        commits = [revision.commit_hash for r in ours for revision in r.revisions]
        kept.delete_revisions(*commits).execute()
        # An interrupted first download has no revision for the line above to delete.
        shutil.rmtree(_folder(repo), ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{repo} could not be removed from {_cache()}: {error}") from error
    return size - cached_size(repo)


def remote_size(repo: str, revision: str = "main", *, weights: str | None = None) -> int:
    """Bytes that `fetch` would download into an empty cache."""
    return sum(size for size, _ in _remote_files(repo, revision, weights).values())


# What to download


def _remote_files(repo: str, revision: str, weights: str | None) -> dict[str, tuple[int, str]]:
    """The needed files on the hub: name -> (bytes, name of the blob in the cache)."""
    with _explained(repo, revision, "list"):
        from huggingface_hub.errors import OfflineModeIsEnabled

        if _constants().HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled
        check_settings()
        from huggingface_hub import HfApi

        info = HfApi(endpoint=endpoint()).model_info(
            repo, revision=revision, files_metadata=True, timeout=_TIMEOUT
        )
        siblings = {s.rfilename: s for s in info.siblings or []}
    names = [name for name in sorted(siblings) if "/" not in name and not name.endswith(".py")]
    texts = [name for name in names if _is_text(name)]
    tensors = [n for n in names if n == weights] if weights else []
    if not weights and (found := _weight_files(repo, revision, names)):
        tensors = [*found.files, *([found.index] if found.index else [])]
    _check_listing(repo, names, texts, tensors)
    return {
        name: (s.size or 0, (s.lfs.sha256 if s.lfs else s.blob_id) or "")
        for name in texts + tensors
        for s in [siblings[name]]
    }


def _weight_files(repo: str, revision: str, names: Sequence[str]) -> WeightFiles | None:
    """The set of weights to download; DownloadError, before any of it is, for one with gaps."""

    def read_index(name: str) -> str:
        from huggingface_hub import hf_hub_download

        with _explained(repo, revision, "list"), _bars(False):
            path = hf_hub_download(
                repo, name, revision=revision, cache_dir=_cache(), endpoint=endpoint()
            )
            return Path(path).read_text(encoding="utf-8")

    try:
        found = choose_weight_files(names, read_index)
    except ValueError as error:
        raise DownloadError(f"{repo}: {error}") from None
    if found and found.missing:
        why = f"named by its {found.index}" if found.index else "called for by the other shards"
        raise DownloadError(
            f"{repo} has no file {printable(found.missing)}, which is {why}; nothing was "
            "downloaded; choose another revision or repository"
        )
    return found


def _check_listing(repo: str, names: list[str], texts: list[str], tensors: list[str]) -> None:
    missing = [name for name in ["config.json"] if name not in texts]
    if not {"tokenizer.json", "tokenizer.model"} & set(texts):
        missing.append("a tokenizer")
    if not tensors:
        missing.append("weights (*.safetensors or pytorch_model*.bin)")
    if missing:
        gguf = next((name for name in names if name.endswith(".gguf")), None)
        advice = f"; {gguf} can be loaded once it is here: give its path" if gguf else ""
        if "adapter_config.json" in names:
            advice = "; it is an adapter: download it and give its folder as --adapter"
        raise DownloadError(
            f"{repo}: expected a model, found no {' and no '.join(missing)}{advice}"
        )


def _complete(folder: Path, weights: str | None) -> bool:
    """Whether every file that loading needs is there; a link to a missing blob is not."""
    try:
        names = _names(folder)
        if not _has_texts(names):
            return False
        if weights:
            return weights in names
        found = files_in(folder)
    except (OSError, ValueError):
        return False
    return found is not None and found.missing is None


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.exists()} if folder.is_dir() else set()


def _has_texts(names: set[str]) -> bool:
    return "config.json" in names and bool({"tokenizer.json", "tokenizer.model"} & names)


def _is_text(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _TEXT_FILES)


def _check_disk(repo: str, files: dict[str, tuple[int, str]]) -> None:
    blobs = _folder(repo) / "blobs"
    need = sum(size for size, blob in files.values() if not (blob and (blobs / blob).is_file()))
    disk = next(path for path in [_cache(), *_cache().parents] if path.exists())
    free = shutil.disk_usage(disk).free
    if free < need:
        raise StorageError(
            f"{repo}: expected {_gb(need)} of free disk, found {_gb(free)} at {disk}; "
            "free some, or set HF_HOME to a larger disk"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


# The hub's cache and settings


def _constants() -> ModuleType:
    # Read when it is imported. Without it, 2.x asks its endpoint for a list of agents to name in
    # the User-Agent: nothing phones home.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if any(address.startswith("socks") for address in proxies().values()):
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # hf_xet knows no socks5h
    from huggingface_hub import constants

    return constants


def _cache() -> Path:
    return Path(_constants().HF_HUB_CACHE)


def _folder(repo: str) -> Path:
    # Documented layout: huggingface.co/docs/huggingface_hub/guides/manage-cache
    return _cache() / f"models--{repo.replace('/', '--')}"


@contextmanager
def _bars(progress: bool) -> Iterator[None]:
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if progress or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# Errors


@contextmanager
def _explained(repo: str, revision: str, doing: str) -> Iterator[None]:
    """Every failure inside becomes one line; Ctrl-C passes."""
    try:
        yield
    except MiniCPMError:
        raise
    except Exception as error:
        raise _explain(error, repo, revision, doing) from error


def _explain(error: Exception, repo: str, revision: str, doing: str) -> MiniCPMError:
    from huggingface_hub import errors

    host = endpoint() or "https://huggingface.co"
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return DownloadError(
                f"{repo} is not kept on this machine and HF_HUB_OFFLINE forbids downloading it; "
                "unset it, or give a folder"
            )
        if isinstance(cause, errors.GatedRepoError):
            return DownloadError(
                f"{repo} is gated; accept its licence at {host}/{repo} and run `hf auth login`"
            )
        if isinstance(cause, errors.RevisionNotFoundError):
            return ModelNotFoundError(
                f"{repo} has no revision {revision!r}; see {host}/{repo}/commits/main"
            )
        if isinstance(cause, (errors.RepositoryNotFoundError, errors.HFValidationError)) or (
            status == 404 and doing == "list"
        ):
            return ModelNotFoundError(
                f"no repository {repo} at {host}; check the spelling, `minicpm-mlx list` shows "
                "known models, and a private one needs `hf auth login`"
            )
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return StorageError(
                f"{repo}: the disk of {_cache()} filled up during the download; "
                "free some space, or set HF_HOME to a larger disk, and run it again"
            )
        if status in (401, 403):
            return DownloadError(
                f"{host} refused {repo} (HTTP {status}); run `hf auth login` with a token for it"
            )
        if status is not None:
            return DownloadError(f"{host} answered HTTP {status} for {repo}; try again later")
    if doing == "list" and isinstance(error, (ValueError, TypeError, LookupError)):
        return DownloadError(
            f"{host} does not answer as a hub does; check HF_ENDPOINT, a proxy or a login page"
        )
    return DownloadError(_network_message(error, repo, host, doing))


def _network_message(error: Exception, repo: str, host: str, doing: str) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    mirror = "" if endpoint() else "; where it is blocked, HF_ENDPOINT can name a mirror"
    if doing == "list":
        return f"{host} could not be reached for {repo} ({reason}); check the network{mirror}"
    kept = "run it again, finished files are kept"
    return f"the download of {repo} broke off ({reason}); {kept}{mirror}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
