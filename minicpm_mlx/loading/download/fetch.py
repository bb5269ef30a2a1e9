"""Downloads one repository: only the files this library reads, from the source that is chosen."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...arguments import printable
from ...errors import DownloadError, ModelNotFoundError
from ...files.weight_files import WeightFiles, choose_weight_files
from .. import network
from . import cache, sources
from .cache import Files
from .gguf_files import DEFAULT, choose_gguf, gguf_models, listed_tags, tag_of
from .hub import HUB
from .modelscope import MODELSCOPE
from .source import RepositorySource, explained


def fetch(
    repo: str,
    revision: str = "main",
    *,
    weights: str | None = None,
    tag: str | None = None,
    offline_ok: bool = True,
    progress: bool = True,
) -> Path:
    """The folder of `repo` at `revision`, downloaded if it is not kept already.

    Of a GGUF repository it is the one file that `tag` chooses (`gguf_files`). With `offline_ok` a
    kept copy is returned without touching the network; without it the source is asked for a newer
    one. `weights` names a weight file that has no standard name. Progress goes to stderr. Raises
    DownloadError or ModelNotFoundError; a call that failed may be repeated, and files that were
    finished are not downloaded again.
    """
    if offline_ok and (kept := cache.cached(repo, revision, weights=weights, tag=tag)):
        _tell_kept(repo, kept, tag)
        return kept
    needed = _needed(repo, revision, weights, tag)
    folder = _download(repo, revision, needed, needed.names, progress)
    if needed.gguf:
        return folder / needed.gguf
    if not cache.is_complete(folder, weights):
        raise DownloadError(
            f"{repo}: expected every weight file its index names, found some missing; "
            "run it again, or download another revision"
        )
    return folder


def fetch_texts(
    repo: str,
    revision: str = "main",
    *,
    weights: str | None = None,
    tag: str | None = None,
    progress: bool = True,
) -> Path:
    """The folder with the config and the tokenizer of `repo`; its weights are not downloaded.

    A .gguf file holds all in one: it is downloaded, and returned. A complete copy is returned
    without touching the network, and kept texts alone if the source cannot be reached. Raises as
    `fetch` does, also for a repository without weights.
    """
    if kept := cache.cached(repo, revision, weights=weights, tag=tag):
        _tell_kept(repo, kept, tag)
        return kept
    try:
        needed = _needed(repo, revision, weights, tag)
    except DownloadError:
        if tag is None and cache.has_texts(
            cache.names_in(kept_texts := cache.snapshot(repo, revision))
        ):
            return kept_texts
        raise
    names = [name for name in needed.names if needed.gguf or cache.is_text(name)]
    folder = _download(repo, revision, needed, names, progress)
    return folder / needed.gguf if needed.gguf else folder


def remote_size(
    repo: str, revision: str = "main", *, weights: str | None = None, tag: str | None = None
) -> int:
    """Bytes that `fetch` would download into an empty cache."""
    needed = _needed(repo, revision, weights, tag, quiet=True)
    return sum(needed.listing[name][0] for name in needed.names)


@dataclass(frozen=True, kw_only=True)
class _Needed:
    """The files to download, and where from."""

    source: RepositorySource
    listing: Files
    names: Sequence[str]
    gguf: str | None = None


def _download(
    repo: str, revision: str, needed: _Needed, names: Sequence[str], progress: bool
) -> Path:
    cache.check_disk(repo, {name: needed.listing[name] for name in names})
    source = needed.source
    with explained(source, repo, revision, "download"), cache.progress_bars(progress):
        return source.transfer(repo, revision, needed.listing, names)


def _needed(
    repo: str, revision: str, weights: str | None, tag: str | None, *, quiet: bool = False
) -> _Needed:
    source, listing = _listed(repo, revision)
    names = [name for name in sorted(listing) if not name.endswith(".py")]
    texts = [name for name in names if cache.is_text(name)]
    tensors = [name for name in names if name == weights] if weights else []
    if tag is None and not weights and (found := _weights(source, repo, revision, listing, names)):
        tensors = [*found.files, *([found.index] if found.index else [])]
    ggufs = [] if tensors or weights else gguf_models(names)
    if ggufs or tag is not None:
        sizes = {name: listing[name][0] for name in names}
        gguf = choose_gguf(repo, sizes, tag)
        if tag is None and len(ggufs) > 1 and not quiet:
            _tell(
                f"{repo} has {listed_tags(ggufs)}; taking {printable(tag_of(gguf, ggufs))}, "
                f"another is {repo}:TAG"
            )
        return _Needed(source=source, listing=listing, names=[gguf], gguf=gguf)
    _check_listing(repo, names, texts, tensors)
    return _Needed(source=source, listing=listing, names=texts + tensors)


def _listed(repo: str, revision: str) -> tuple[RepositorySource, Files]:
    """The source and its listing; says where `auto` chose ModelScope."""
    if cache.constants().HF_HUB_OFFLINE:
        with explained(HUB, repo, revision, "list"):
            from huggingface_hub.errors import OfflineModeIsEnabled

            raise OfflineModeIsEnabled
    source, failure = sources.choose()
    try:
        listing = _ask(source, repo, revision)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{error}{_elsewhere(source, failure, repo, revision)}") from None
    except DownloadError as error:
        sources.forget()
        if failure is None:
            raise
        raise DownloadError(
            f"{error}; {HUB.address()} {failure}; HF_ENDPOINT can name a mirror of it"
        ) from None
    if failure is not None and repo not in sources.told:
        sources.told.add(repo)
        _tell(
            f"{HUB.address()} {failure}; downloading {repo} from {source.address()} "
            "(--source chooses) · 无法连接 huggingface.co，改从 ModelScope 下载"
        )
    return source, listing


def _ask(source: RepositorySource, repo: str, revision: str) -> Files:
    with explained(source, repo, revision, "list"):
        source.check_settings()
        return source.list_files(repo, revision)


def _elsewhere(source: RepositorySource, failure: str | None, repo: str, revision: str) -> str:
    """Where `auto` found no repository: whether the other source has it."""
    if failure is not None:
        return f"; {HUB.address()} {failure}"
    if sources.chosen() != "auto" or source.variable != HUB.variable or network.endpoint():
        return ""
    try:
        _ask(MODELSCOPE, repo, revision)
    except (DownloadError, ModelNotFoundError):
        return ""
    return f"; {MODELSCOPE.address()} has one of this name: --source modelscope"


def _weights(
    source: RepositorySource, repo: str, revision: str, listing: Files, names: Sequence[str]
) -> WeightFiles | None:
    """The set of weights to download; DownloadError, before any of it is, for one with gaps."""

    def read_index(name: str) -> str:
        with explained(source, repo, revision, "list"):
            return source.read_text(repo, revision, listing, name)

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


def _check_listing(
    repo: str, names: Sequence[str], texts: Sequence[str], tensors: Sequence[str]
) -> None:
    missing = [name for name in ["config.json"] if name not in texts]
    if not {"tokenizer.json", "tokenizer.model"} & set(texts):
        missing.append("a tokenizer")
    if not tensors:
        missing.append("weights (*.safetensors, pytorch_model*.bin or *.gguf)")
    if missing:
        advice = ""
        if "adapter_config.json" in names:
            advice = "; it is an adapter: download it and give its folder as --adapter"
        raise DownloadError(
            f"{repo}: expected a model, found no {' and no '.join(missing)}{advice}"
        )


def _tell_kept(repo: str, kept: Path, tag: str | None) -> None:
    """Say which file of a GGUF repository was taken, if it is not the one expected."""
    if kept.is_file() and tag is None and (named := tag_of(kept.name, [kept.name])) != DEFAULT:
        _tell(f"{repo}: taking {printable(named)}, which is kept; another is {repo}:TAG")


def _tell(line: str) -> None:
    if sys.stderr is not None:
        print(line, file=sys.stderr, flush=True)
