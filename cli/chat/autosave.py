"""Where a conversation is kept on disk, beside others that may be going on at the same time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from minicpm_mlx.errors import SessionError

if TYPE_CHECKING:
    from minicpm_mlx import Chat
    from minicpm_mlx.lm.sessions import SavedSession, Version


class AutoSave:
    """Saves a conversation under its name as long as no one else writes there; `note` tells."""

    def __init__(self, name: str | None, note: Callable[..., None]) -> None:
        self.name = name
        """None: nothing is kept."""
        self._note = note
        self._version: Version | None = None  # of the file as last read or written here
        self._known: SavedSession | None = None  # what is in it
        self._warned = False

    def start(self, name: str | None) -> None:
        """Go on under a name that has no file yet."""
        self.name, self._version, self._known = name, None, None

    def follow(self, saved: SavedSession, chat: Chat) -> None:
        """Go on with a session that `chat` was restored from."""
        from minicpm_mlx.lm import sessions

        self.name, self._version, self._known = saved.name, saved.version, sessions.snapshot(chat)

    def save(self, chat: Chat) -> None:
        """Keep what has changed; where that fails, say so once and go on."""
        self._trying(self._save, chat)

    def keep_cache(self, chat: Chat) -> None:
        """Keep the key-value cache as well, so that going on later reads nothing again."""
        if self._is_ours() and chat.messages and chat.session.ids:
            from minicpm_mlx.lm.session_cache import save_cache

            self._trying(save_cache, chat, self.name)

    def save_as(self, chat: Chat, name: str, *, over: bool) -> bool:
        """Go on under another name; False where a session has it, unless that may be replaced."""
        from minicpm_mlx.lm import sessions

        if name == self.name:
            self._save(chat)
            return True
        exists = sessions.version(name) is not None
        if exists and not over:
            return False
        if exists:
            sessions.save(chat, name)
        else:
            name = sessions.save_new(chat, name)
        self.name, self._version = name, sessions.version(name)
        self._known = sessions.snapshot(chat)
        return True

    def _save(self, chat: Chat) -> None:
        from minicpm_mlx.lm import sessions

        if self.name is None or (now := sessions.snapshot(chat)) == self._known:
            return
        if not chat.messages:
            if self._is_ours():
                sessions.remove(self.name)
            self._version, self._known = None, now
            return
        if self._is_ours():
            sessions.save(chat, self.name)
        else:
            before, self.name = self.name, sessions.save_new(chat, self.name)
            if self._version is not None and before != self.name:
                self._note("elsewhere", style="warning", name=before, new=self.name)
        self._version, self._known = sessions.version(self.name), now

    def _is_ours(self) -> bool:
        """Whether the file is there as it was last read or written."""
        from minicpm_mlx.lm import sessions

        if self.name is None or self._version is None:
            return False
        return sessions.version(self.name) == self._version

    def _trying(self, write: Callable[..., object], *arguments: object) -> None:
        try:
            write(*arguments)
            self._warned = False
        except SessionError as error:
            if not self._warned:
                self._note("unsaved", style="warning", error=error)
            self._warned = True
