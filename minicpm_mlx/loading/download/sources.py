"""Chooses between the hub and ModelScope: an argument, else MINICPM_MLX_SOURCE, else `auto`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ...errors import InvalidArgumentError
from .. import network
from .cache import constants
from .hub import HUB
from .modelscope import MODELSCOPE
from .source import RepositorySource, reason

VARIABLE = "MINICPM_MLX_SOURCE"
SOURCES: dict[str, RepositorySource] = {"hub": HUB, "modelscope": MODELSCOPE}
CHOICES = (*SOURCES, "auto")
PATIENCE = 2.0
"""Seconds that the hub has to answer before ModelScope is taken."""

_argument: ContextVar[str | None] = ContextVar("source", default=None)
_failures: dict[str, str | None] = {}
"""Why an address could not be reached, as found in this process; None: it was."""
told: set[str] = set()
"""Repositories that were said to come from ModelScope."""


@contextmanager
def using(source: str | None) -> Iterator[None]:
    """Downloads of this thread come from `source` meanwhile; None leaves the choice as it is."""
    check_source(source, "source")
    token = _argument.set(source or _argument.get())
    try:
        yield
    finally:
        _argument.reset(token)


def check_source(source: str | None, name: str) -> None:
    """InvalidArgumentError for a source that is none."""
    if source is not None and source not in CHOICES:
        raise InvalidArgumentError(
            f"must be one of {', '.join(CHOICES)}, got {source!r}", field=name
        )


def choose() -> tuple[RepositorySource, str | None]:
    """The source, and why the hub cannot be reached where `auto` chose ModelScope for that.

    `auto` is the hub if it answers within `PATIENCE`, or if HF_ENDPOINT names a mirror.
    """
    named = chosen()
    if named != "auto":
        return SOURCES[named], None
    if network.endpoint():
        return HUB, None
    HUB.check_settings()
    address = str(constants().ENDPOINT)
    if address not in _failures:
        _failures[address] = _failure(address)
    failure = _failures[address]
    return (HUB, None) if failure is None else (MODELSCOPE, failure)


def chosen() -> str:
    """`hub`, `modelscope` or `auto`, as the user has it."""
    named = _argument.get()
    if named is None and (named := os.environ.get(VARIABLE, "").strip().lower() or None):
        check_source(named, VARIABLE)
    return named or "auto"


def forget() -> None:
    """Have `auto` try the hub again."""
    _failures.clear()
    told.clear()


def _failure(address: str) -> str | None:
    """Why the hub cannot be reached; None if it answers in time."""
    from huggingface_hub import get_session

    client = get_session()
    found: list[str | None] = []

    def ask() -> None:
        try:
            status = client.head(address, timeout=PATIENCE).status_code
            refused = status in (403, 451) or status >= 500
            found.append(f"answered HTTP {status}" if refused else None)
        except Exception as error:
            found.append(f"could not be reached ({reason(error)})")

    # A thread, since each of name, connection and handshake may take its own time, and a name
    # cannot be given up.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found[0] if found else f"did not answer within {PATIENCE:.0f} s"
