"""ModelScope as a source, over HTTP by the hub's own client; no code of its SDK is needed.

MODELSCOPE_ENDPOINT names another server, MODELSCOPE_API_TOKEN opens private repositories. Proxies
and the hub's settings of its client hold here too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from ...arguments import printable
from ...errors import DownloadError, MiniCPMError, ModelNotFoundError
from ...files.atomic import sha256
from .. import network
from .cache import Files, is_revision, repository
from .source import TIMEOUT

OWNERS = {"openbmb": "OpenBMB"}
"""Owners by their names on the hub, where ModelScope spells them otherwise; the cache keeps the
hub's."""
ATTEMPTS = 5
"""Times that a transfer which brings nothing new is tried before it is given up."""
REDIRECTS = 5
LISTING = 1 << 24
"""Bytes of a listing, at most."""


class ModelScope:
    """www.modelscope.cn."""

    variable = "MODELSCOPE_ENDPOINT"

    def advice(self) -> str:
        """None."""
        return ""

    def address(self) -> str:
        """MODELSCOPE_ENDPOINT, else its own."""
        named = os.environ.get(self.variable, "").strip().rstrip("/")
        return named or "https://www.modelscope.cn"

    def check_settings(self) -> None:
        """DownloadError for a MODELSCOPE_ENDPOINT or a proxy that no request could use."""
        network.check_settings(self.variable)

    def list_files(self, repo: str, revision: str) -> Files:
        """The files at the top of a repository, with their sha256."""
        from huggingface_hub import get_session

        return listing(get_session(), repo, revision)

    def read_text(self, repo: str, revision: str, listing: Files, name: str) -> str:
        """The text of a small file, which is kept."""
        from huggingface_hub import get_session

        blob = _bring(get_session(), repo, revision, name, listing[name], repository(repo), _unseen)
        return blob.read_text(encoding="utf-8")

    def transfer(self, repo: str, revision: str, listing: Files, names: Sequence[str]) -> Path:
        """Bring files to the cache; the folder of the snapshot they are in."""
        from huggingface_hub import get_session
        from huggingface_hub.utils.tqdm import tqdm

        size = sum(listing[name][0] for name in names)
        # As the hub's own bar.
        with tqdm(total=size, unit="B", unit_scale=True, desc="Downloading bytes") as bar:
            return transfer(
                get_session(), repo, revision, listing, names, repository(repo), bar.update
            )

    def explain(
        self, cause: BaseException, status: int | None, repo: str, revision: str, doing: str
    ) -> MiniCPMError | None:
        """The meaning of refusals."""
        if status == 404:
            at = "" if revision == "main" else f" with revision {revision!r}"
            return ModelNotFoundError(
                f"no repository {_remote(repo)}{at} at {self.address()}; check the spelling, and "
                "a private one needs its token in MODELSCOPE_API_TOKEN"
            )
        if status in (401, 403):
            return DownloadError(
                f"{self.address()} refused {repo} (HTTP {status}); set MODELSCOPE_API_TOKEN to a "
                "token that may read it"
            )
        return None


MODELSCOPE = ModelScope()


def listing(client: Any, repo: str, revision: str) -> Files:
    """The files at the top of `repo`.

    Raises the client's errors, and ValueError, LookupError or TypeError for an answer that is no
    listing.
    """
    url = f"{MODELSCOPE.address()}/api/v1/models/{_remote(repo)}/repo/files"
    parameters = {"Revision": _branch(revision), "Recursive": "false"}
    body = b""
    with _answer(client, url, params=parameters) as answer:
        for chunk in answer.iter_bytes():
            body += chunk
            if len(body) > LISTING:
                raise ValueError("too long")
    found = json.loads(body)
    if found.get("Success") is False:
        raise DownloadError(
            f"{MODELSCOPE.address()} refused {repo}: {printable(str(found.get('Message')))[:200]}"
        )
    return {
        str(file["Path"]): (int(file["Size"]), str(file.get("Sha256") or "").lower())
        for file in found["Data"]["Files"]
        if file["Type"] == "blob" and "/" not in str(file["Path"])
    }


def transfer(
    client: Any,
    repo: str,
    revision: str,
    listing: Files,
    names: Sequence[str],
    folder: Path,
    received: Callable[[int], object],
) -> Path:
    """Bring files of a listing to `folder`, the repository's in the cache; return the snapshot's.

    Interrupted files are continued, and each is checked against its size and hash. `received` is
    called with the number of bytes of each step. Raises DownloadError, and the client's and the
    system's errors.
    """
    if not is_revision(revision):
        raise ModelNotFoundError(f"{repo} has no revision {revision!r}; expected a branch or tag")
    for name in names:
        _check(name, *listing[name])
    for name in names:
        _bring(client, repo, revision, name, listing[name], folder, received)
    snapshot = folder / "snapshots" / _commit(listing)
    snapshot.mkdir(parents=True, exist_ok=True)
    for name, (_, digest) in listing.items():
        if name in names:
            _link(folder / "blobs" / digest, snapshot / name)
        elif name.lower().endswith(".gguf"):  # kept under another snapshot
            with suppress(DownloadError):
                _check(name, 0, digest)
                if (folder / "blobs" / digest).is_file():
                    _link(folder / "blobs" / digest, snapshot / name)
    reference = folder / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(snapshot.name)
    return snapshot


def _remote(repo: str) -> str:
    owner, _, name = repo.partition("/")
    return f"{OWNERS.get(owner.lower(), owner)}/{name}"


def _branch(revision: str) -> str:
    return "master" if revision == "main" else revision


def _check(name: str, size: int, digest: str) -> None:
    """Refuse what a server says of a file before it becomes a path."""
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name or "\\" in name:
        raise DownloadError(
            f"{MODELSCOPE.address()} lists {printable(name)!r}; expected the name of a file"
        )
    if not re.fullmatch("[0-9a-f]{64}", digest) or size < 0:
        raise DownloadError(
            f"{MODELSCOPE.address()} lists {printable(name)} with {size} bytes and sha256 "
            f"{printable(digest)!r}; expected 64 hexadecimal digits; nothing was downloaded"
        )


def _commit(listing: Files) -> str:
    """A commit's name in the hub's layout: ModelScope lists files without their commit."""
    content = "\n".join(f"{name} {digest}" for name, (_, digest) in sorted(listing.items()))
    return hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()


def _link(blob: Path, link: Path) -> None:
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(Path("../../blobs") / blob.name)
    except FileExistsError:  # by another process, to the same
        pass
    except OSError:  # a disk without links: as the hub does
        blob.replace(link)


def _bring(
    client: Any,
    repo: str,
    revision: str,
    name: str,
    entry: tuple[int, str],
    folder: Path,
    received: Callable[[int], object],
) -> Path:
    """The blob of one file, downloaded if it is not kept; one process at a time, as the hub's."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    size, digest = entry
    _check(name, size, digest)
    blob = folder / "blobs" / digest
    lock = folder.parent / ".locks" / folder.name / f"{digest}.lock"
    for path in (blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.is_file():
            received(size)
        else:
            place = f"models/{_remote(repo)}/resolve/{quote(_branch(revision))}/{quote(name)}"
            _download(client, f"{MODELSCOPE.address()}/{place}", blob, size, received)
    return blob


def _download(
    client: Any, url: str, blob: Path, size: int, received: Callable[[int], object]
) -> None:
    """Download one file whose sha256 is the name of `blob`; what the hub began is continued."""
    partial = blob.with_name(f"{blob.name}.incomplete")
    failures, counted, continued = 0, 0, partial.is_file()
    while True:
        before = partial.stat().st_size if partial.is_file() else 0
        received(before - counted)
        counted = before
        try:
            for count in _append(client, url, partial, before, size):
                counted += count
                received(count)
        except OSError:
            raise
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", 500)
            after = partial.stat().st_size if partial.is_file() else 0
            failures = 0 if after > before else failures + 1
            if failures >= ATTEMPTS or 400 <= status < 500:
                raise
            time.sleep(0.2 * 2**failures)
            continue
        found = partial.stat().st_size
        if found == size and sha256(partial) == blob.name:
            partial.replace(blob)
            return
        partial.unlink()
        if not continued:
            raise DownloadError(
                f"{url}: expected {size} bytes with sha256 {blob.name}, got {found} bytes or other "
                "contents; run it again, or download another revision"
            )
        continued = False  # what lay here may have been wrong: once anew


def _append(client: Any, url: str, partial: Path, start: int, size: int) -> Iterator[int]:
    """Append what is missing of a file to `partial`; yield the number of bytes of each step."""
    if start >= size > 0:
        return
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    with _answer(client, url, headers=headers) as answer:
        resumed = start > 0 and answer.status_code == 206
        with partial.open("ab" if resumed else "wb") as file:
            if start and not resumed:  # the server sends the whole file anew
                yield -start
            for chunk in answer.iter_raw():  # as it comes: what is held back is lost
                file.write(chunk)
                yield len(chunk)
                if file.tell() > size:
                    return


@contextmanager
def _answer(client: Any, url: str, **options: Any) -> Iterator[Any]:
    """The answer to a request. The token goes to ModelScope's own address, not to the one that
    keeps its files."""
    request = client.build_request("GET", url, timeout=TIMEOUT, **options)
    for _ in range(REDIRECTS):
        token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
        if token and _origin(str(request.url)) == _origin(MODELSCOPE.address()):
            request.headers["Cookie"] = f"m_session_id={token}"  # as the SDK sends it
        else:
            request.headers.pop("Cookie", None)
        answer = client.send(request, stream=True, follow_redirects=False)
        if answer.next_request is None:
            break
        request = answer.next_request
        answer.close()
    try:
        answer.raise_for_status()
        yield answer
    finally:
        answer.close()


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    usual = {"http": 80, "https": 443}.get(parts.scheme, 0)
    return parts.scheme, parts.hostname or "", parts.port or usual


def _unseen(count: int) -> None:
    """For a file without a progress bar."""
