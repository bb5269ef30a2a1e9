"""Saves a conversation to disk after each turn, without overwriting what others saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from minicpm_mlx.errors import SessionError

if TYPE_CHECKING:
    from minicpm_mlx import Chat
    from minicpm_mlx.lm.sessions import SavedSession, Version


class AutoSave:
    """Saves a conversation unless another program changed its file; `note` reports to the user."""

    def __init__(self, name: str | None, note: Callable[..., None]) -> None:
        self.name = name
        """None: nothing is saved."""
        self._note = note
        self._version: Version | None = None  # of the file as last read or written here
        self._saved: SavedSession | None = None  # its content
        self._warned = False

    def start(self, name: str | None) -> None:
        """Saves under a name that has no file yet."""
        self.name, self._version, self._saved = name, None, None

    def follow(self, saved: SavedSession, chat: Chat) -> None:
        """Continues the session that `chat` was restored from."""
        from minicpm_mlx.lm import sessions

        self.name, self._version, self._saved = saved.name, saved.version, sessions.snapshot(chat)

    def save(self, chat: Chat) -> None:
        """Saves what has changed; reports a failure once."""
        self._try(self._save, chat)

    def save_cache(self, chat: Chat) -> None:
        """Saves the KV cache too, so that resuming needs no prefill."""
        if self._is_unchanged() and chat.messages and chat.session.ids:
            from minicpm_mlx.lm import session_cache

            self._try(session_cache.save_cache, chat, self.name)

    def save_as(self, chat: Chat, name: str, *, overwrite: bool) -> bool:
        """Saves under another name from now on; False if a session has it, unless `overwrite`."""
        from minicpm_mlx.lm import sessions

        if name == self.name:
            self._save(chat)
            return True
        exists = sessions.version(name) is not None
        if exists and not overwrite:
            return False
        if exists:
            sessions.save(chat, name)
        else:
            name = sessions.save_new(chat, name)
        self.name, self._version = name, sessions.version(name)
        self._saved = sessions.snapshot(chat)
        return True

    def _save(self, chat: Chat) -> None:
        from minicpm_mlx.lm import sessions

        if self.name is None or (snapshot := sessions.snapshot(chat)) == self._saved:
            return
        if not chat.messages:
            if self._is_unchanged():
                sessions.remove(self.name)
            self._version, self._saved = None, snapshot
            return
        if self._is_unchanged():
            sessions.save(chat, self.name)
        else:
            old_name, self.name = self.name, sessions.save_new(chat, self.name)
            if self._version is not None and old_name != self.name:
                self._note("elsewhere", style="warning", name=old_name, new=self.name)
        self._version, self._saved = sessions.version(self.name), snapshot

    def _is_unchanged(self) -> bool:
        """Whether the file is as it was last read or written here."""
        from minicpm_mlx.lm import sessions

        if self.name is None or self._version is None:
            return False
        return sessions.version(self.name) == self._version

    def _try(self, write: Callable[..., object], *arguments: object) -> None:
        try:
            write(*arguments)
            self._warned = False
        except SessionError as error:
            if not self._warned:
                self._note("unsaved", style="warning", error=error)
            self._warned = True
