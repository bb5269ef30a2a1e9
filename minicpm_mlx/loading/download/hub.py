"""Hugging Face's hub as a source: HF_ENDPOINT (a mirror), HF_HUB_OFFLINE and HF_TOKEN mean what
they mean to huggingface_hub."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from ...errors import DownloadError, MiniCPMError, ModelNotFoundError
from .. import network
from .cache import Files, constants, progress_bars, root
from .source import TIMEOUT, explained


class Hub:
    """The hub, by huggingface_hub."""

    variable = "HF_ENDPOINT"

    def advice(self) -> str:
        """Ways round a blocked network; none where the user chose a mirror."""
        if network.endpoint():
            return ""
        return (
            "; where it is blocked, --source modelscope takes ModelScope's copy, and HF_ENDPOINT "
            "can name a mirror"
        )

    def address(self) -> str:
        """HF_ENDPOINT, else the hub's own."""
        return network.endpoint() or "https://huggingface.co"

    def check_settings(self) -> None:
        """DownloadError for an HF_ENDPOINT or a proxy that no request could use."""
        network.check_settings(self.variable)

    def list_files(self, repo: str, revision: str) -> Files:
        """The files at the top of a repository; other blobs than LFS's go by git's hash."""
        from huggingface_hub import HfApi

        info = HfApi(endpoint=network.endpoint()).model_info(
            repo, revision=revision, files_metadata=True, timeout=TIMEOUT
        )
        return {
            s.rfilename: (s.size or 0, (s.lfs.sha256 if s.lfs else s.blob_id) or "")
            for s in info.siblings or []
            if "/" not in s.rfilename
        }

    def read_text(self, repo: str, revision: str, listing: Files, name: str) -> str:
        """The text of a small file, which is kept."""
        from huggingface_hub import hf_hub_download

        with progress_bars(False):
            path = hf_hub_download(
                repo, name, revision=revision, cache_dir=root(), endpoint=network.endpoint()
            )
        return Path(path).read_text(encoding="utf-8")

    def transfer(self, repo: str, revision: str, listing: Files, names: Sequence[str]) -> Path:
        """Bring files to the cache; the folder of the snapshot they are in."""
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[glob.escape(name) for name in names],
                cache_dir=root(),
                endpoint=network.endpoint(),
            )
        )

    def explain(
        self, cause: BaseException, status: int | None, repo: str, revision: str, doing: str
    ) -> MiniCPMError | None:
        """The meaning of huggingface_hub's errors."""
        from huggingface_hub import errors

        host = self.address()
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
        if status in (401, 403):
            return DownloadError(
                f"{host} refused {repo} (HTTP {status}); run `hf auth login` with a token for it"
            )
        return None


HUB = Hub()


def fetch_data(
    repo: str, files: Sequence[str], revision: str = "main", *, progress: bool = True
) -> Path:
    """The folder of the data set `repo` with these files, downloaded where they are not kept.

    Data sets come from the hub alone. With all files kept, the network is not touched. Raises as
    `fetch` does, and DownloadError for a file that the repository does not have.
    """
    if not (offline := constants().HF_HUB_OFFLINE):
        HUB.check_settings()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    fetch = partial(
        snapshot_download,
        repo,
        repo_type="dataset",
        revision=revision,
        allow_patterns=[glob.escape(name) for name in files],
        cache_dir=root(),
        endpoint=network.endpoint(),
    )
    with suppress(LocalEntryNotFoundError):
        kept = Path(fetch(local_files_only=True))
        if all((kept / name).is_file() for name in files):
            return kept
    with explained(HUB, repo, revision, "download"), progress_bars(progress):
        if offline:
            raise OfflineModeIsEnabled
        folder = Path(fetch())
    if lacking := [name for name in files if not (folder / name).is_file()]:
        raise DownloadError(
            f"{repo} has no file {lacking[0]} at {revision}; download the set another way and give "
            "its folder"
        )
    return folder
