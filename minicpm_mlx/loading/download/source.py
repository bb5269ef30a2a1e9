"""The interface of a source of repositories, and its failures in one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ...errors import DownloadError, MiniCPMError, StorageError
from .cache import Files, root

TIMEOUT = 20.0
"""Seconds without an answer; huggingface_hub's listing has none and would hang."""


class RepositorySource(Protocol):
    """A place that has repositories; all its methods raise whatever their client does."""

    variable: str
    """The environment variable that names another server."""

    def advice(self) -> str:
        """Follows a message of a network that is blocked."""

    def address(self) -> str:
        """The server's address, without a slash at its end."""

    def check_settings(self) -> None:
        """DownloadError for an address or a proxy that no request could use."""

    def list_files(self, repo: str, revision: str) -> Files:
        """The files at the top of a repository."""

    def read_text(self, repo: str, revision: str, listing: Files, name: str) -> str:
        """The text of a small file of a listing, which is kept."""

    def transfer(self, repo: str, revision: str, listing: Files, names: Sequence[str]) -> Path:
        """Bring files of a listing to the cache; the folder of the snapshot they are in."""

    def explain(
        self, cause: BaseException, status: int | None, repo: str, revision: str, doing: str
    ) -> MiniCPMError | None:
        """The meaning of an error, if it has one of its own here; `status` is HTTP's."""


@contextmanager
def explained(source: RepositorySource, repo: str, revision: str, doing: str) -> Iterator[None]:
    """Every failure inside becomes one line; Ctrl-C passes. `doing` is "list" or "download"."""
    try:
        yield
    except MiniCPMError:
        raise
    except Exception as error:
        raise _explain(source, error, repo, revision, doing) from error


_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
"""Of files; those of sockets, which a firewall can refuse too, name no file."""


def _explain(
    source: RepositorySource, error: Exception, repo: str, revision: str, doing: str
) -> MiniCPMError:
    from huggingface_hub.errors import OfflineModeIsEnabled

    host = source.address()
    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, OfflineModeIsEnabled):
            return DownloadError(
                f"{repo} is not kept on this machine and HF_HUB_OFFLINE forbids downloading it; "
                "unset it, or give a folder"
            )
        if found := source.explain(cause, status, repo, revision, doing):
            return found
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return StorageError(
                f"{repo}: the disk of {root()} filled up during the download; "
                "free some space, or set HF_HOME to a larger disk, and run it again"
            )
        if isinstance(cause, OSError) and cause.filename and cause.errno in _UNWRITABLE:
            return StorageError(
                f"{repo}: {cause.filename} cannot be read or written ({cause.strerror}); "
                "set HF_HOME to a folder with room that you may write to"
            )
        if status is not None:
            return DownloadError(f"{host} answered HTTP {status} for {repo}; try again later")
    if doing == "list" and isinstance(error, (ValueError, TypeError, LookupError)):
        return DownloadError(
            f"{host} does not answer as a hub does; check {source.variable}, a proxy or a login "
            "page"
        )
    if doing == "list":
        return DownloadError(
            f"{host} could not be reached for {repo} ({reason(error)}); check the network"
            f"{source.advice()}"
        )
    return DownloadError(
        f"the download of {repo} broke off ({reason(error)}); run it again, finished files are "
        f"kept{source.advice()}"
    )


def reason(error: Exception) -> str:
    """The first line of an error, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
