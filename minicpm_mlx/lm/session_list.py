"""Facts on every saved session: sizes, model, time."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from ..errors import SessionError
from . import sessions


@dataclass(frozen=True, kw_only=True)
class SessionSummary:
    """A row of the list; its fields are the keys of the JSON."""

    name: str
    title: str = ""
    """The first question's first line."""
    messages: int = 0
    model: str | None = None
    """None if the file is damaged."""
    adapter: str | None = None
    saved: str
    """Time of saving, in ISO 8601 with the time zone."""
    bytes: int
    cache_bytes: int
    """Of the kept KV cache; 0 if there is none."""
    problem: str | None = None
    """Why the session cannot be read."""


def summaries() -> list[SessionSummary]:
    """All sessions, the last saved first, also those that cannot be read."""
    caches = sessions.cache_sizes()
    rows = []
    for name in sessions.names():
        with suppress(OSError, SessionError):  # deleted meanwhile, or not a session's name
            stat = sessions.path_of(name).stat()
            facts: dict[str, Any] = {
                "name": name,
                "saved": datetime.fromtimestamp(stat.st_mtime, timezone.utc)
                .astimezone()
                .isoformat(timespec="seconds"),
                "bytes": stat.st_size,
                "cache_bytes": caches.get(sessions.cache_path(name), 0),
            }
            rows.append((stat.st_mtime_ns, _summary(name, facts)))
    return [summary for _, summary in sorted(rows, key=lambda row: row[0], reverse=True)]


def _summary(name: str, facts: dict[str, Any]) -> SessionSummary:
    try:
        saved = sessions.load(name)
    except SessionError as error:
        return SessionSummary(**facts, problem=str(error))
    return SessionSummary(
        **facts,
        title=saved.title,
        messages=len(saved.messages),
        model=saved.model,
        adapter=saved.adapter,
    )
