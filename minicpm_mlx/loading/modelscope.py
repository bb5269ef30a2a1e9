"""Downloads from ModelScope into the hub's cache, over HTTP; no code of its SDK is needed.

MODELSCOPE_ENDPOINT names another server, MODELSCOPE_API_TOKEN opens private repositories.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DownloadError
from ..files.atomic import alone

Files = Mapping[str, tuple[int, str]]
"""Bytes and sha256 by name."""

ENDPOINT = "https://www.modelscope.cn"
TIMEOUT = 20.0
"""Seconds without an answer, or without a byte of a file."""
ATTEMPTS = 5
"""Times that a transfer which brings nothing new is tried before it is given up."""
CHUNK = 1 << 20


def endpoint() -> str:
    return os.environ.get("MODELSCOPE_ENDPOINT", "").rstrip("/") or ENDPOINT


def listing(client: Any, repo: str, revision: str) -> Files:
    """The files at the top of `repo`.

    Raises the client's errors, and ValueError, LookupError or TypeError for an answer that is no
    listing.
    """
    url = f"{endpoint()}/api/v1/models/{repo}/repo/files"
    parameters = {"Revision": _branch(revision), "Recursive": "false"}
    answer = client.get(url, params=parameters, headers=_headers(), timeout=TIMEOUT)
    answer.raise_for_status()
    files = answer.json()["Data"]["Files"]
    return {
        str(file["Path"]): (int(file["Size"]), str(file["Sha256"]).lower())
        for file in files
        if file["Type"] == "blob"
    }


def transfer(
    client: Any,
    repo: str,
    revision: str,
    files: Files,
    folder: Path,
    received: Callable[[int], object],
) -> Path:
    """Bring `files` to `folder`, the repository's in the hub's cache; return the snapshot's.

    Interrupted files are continued, and each is checked against its size and hash. `received` is
    called with the number of bytes of each step. Raises DownloadError, StorageError for a second
    process, and the client's and the system's errors.
    """
    blobs = folder / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    snapshot = folder / "snapshots" / _snapshot_name(files)
    with alone(blobs, folder):
        for name, (size, digest) in files.items():
            blob = blobs / digest
            if blob.is_file():
                received(size)
            else:
                url = f"{endpoint()}/models/{repo}/resolve/{_branch(revision)}/{name}"
                _bring(client, url, blob, size, received)
        snapshot.mkdir(parents=True, exist_ok=True)
        for name, (_, digest) in files.items():
            link = snapshot / name
            link.unlink(missing_ok=True)
            link.symlink_to(Path("../../blobs") / digest)
        reference = folder / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(snapshot.name)
    return snapshot


def _branch(revision: str) -> str:
    return "master" if revision == "main" else revision


def _headers() -> dict[str, str]:
    token = os.environ.get("MODELSCOPE_API_TOKEN", "")
    # The SDK sends its token as this cookie.
    return {"Cookie": f"m_session_id={token}"} if token else {}


def _snapshot_name(files: Files) -> str:
    """A commit's name in the hub's layout: ModelScope lists files without their commit."""
    content = "\n".join(f"{name} {digest}" for name, (_, digest) in sorted(files.items()))
    return hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()


def _bring(client: Any, url: str, blob: Path, size: int, received: Callable[[int], object]) -> None:
    """Download one file whose sha256 is the name of `blob`."""
    partial = blob.with_name(f"{blob.name}.incomplete")
    failures, counted = 0, 0
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
        break
    if partial.stat().st_size != size or _sha256(partial) != blob.name:
        found = partial.stat().st_size
        partial.unlink()
        raise DownloadError(
            f"{url}: expected {size} bytes with sha256 {blob.name}, got {found} bytes or other "
            "contents; run it again, or download another revision"
        )
    partial.replace(blob)


def _append(client: Any, url: str, partial: Path, start: int, size: int) -> Iterator[int]:
    """Append what is missing of a file to `partial`; yield the number of bytes of each step."""
    if start >= size > 0:
        return
    headers = _headers() | {"Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    with client.stream("GET", url, headers=headers, timeout=TIMEOUT) as answer:
        answer.raise_for_status()
        resumed = start > 0 and answer.status_code == 206
        with partial.open("ab" if resumed else "wb") as file:
            if start and not resumed:  # the server sends the whole file anew
                yield -start
            for chunk in answer.iter_raw():  # as it comes: what is held back is lost
                file.write(chunk)
                yield len(chunk)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
