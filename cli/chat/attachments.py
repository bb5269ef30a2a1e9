"""The chat's commands that read and write files: /attach and /save."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from minicpm_mlx.lm.attachments import Files, with_files

if TYPE_CHECKING:
    from .conversation import TerminalChat


def attach(terminal: TerminalChat, text: str) -> None:
    if text and text != "off":
        _attach(terminal, typed_path(text))
        return
    if text:
        terminal.attached.clear()
    for name, body in terminal.attached:
        _note_attached(terminal, name, _file_tokens(terminal, [(name, body)]))
    if not terminal.attached:
        terminal.note("dropped" if text else "no_files")


def _attach(terminal: TerminalChat, path: Path) -> None:
    room = _room(terminal)
    try:
        if path.exists() and not path.is_file():  # a device would never end
            terminal.note("no_file", style="error", path=path)
            return
        size = path.stat().st_size
        body = path.read_text(encoding="utf-8-sig") if size <= 100 * room else None
    except UnicodeDecodeError:
        terminal.note("binary", style="error", path=path)
        return
    except (OSError, ValueError) as error:
        _note_failed(terminal, path, error)
        return
    # The model is sent a name without newlines or bytes that are no text.
    name = "".join(char if char.isprintable() else "\ufffd" for char in path.name)
    if body is None:  # too large to be read: a token has about four bytes
        terminal.note("too_long", style="error", path=path, count=size // 4, room=room)
    elif not body.strip():
        terminal.note("empty", style="error", path=path)
    elif (name, body) in terminal.attached:
        terminal.note("waits", style="error", name=name)
    elif (tokens := _file_tokens(terminal, [(name, body)])) >= room:
        terminal.note("too_long", style="error", path=path, count=tokens, room=room)
    else:
        terminal.attached.append((name, body))
        _note_attached(terminal, name, tokens)


def _note_attached(terminal: TerminalChat, name: str, tokens: int) -> None:
    terminal.note("attached", name=name, tokens=terminal.texts.count("token", tokens))


def _note_failed(terminal: TerminalChat, path: Path, error: OSError | ValueError) -> None:
    reason = getattr(error, "strerror", None) or error
    terminal.note("failed", style="error", path=path, reason=reason)


def _room(terminal: TerminalChat) -> int:
    """Tokens that another attached file may have."""
    chat = terminal.chat
    used = chat.tokens() if chat.on_overflow == "stop" else 0  # else older turns make room
    return max(chat.context_length - used - _file_tokens(terminal, terminal.attached), 0)


def _file_tokens(terminal: TerminalChat, files: Files) -> int:
    return token_count(terminal, with_files(files, ""))


def token_count(terminal: TerminalChat, text: str) -> int:
    return len(terminal.chat.lm.tokenizer.encode(text, add_bos=False))


def typed_path(text: str) -> Path:
    """A path as typed, or as a terminal pastes a dropped file: quoted, or with \\."""
    try:
        whole, parts = Path(text).expanduser(), shlex.split(text)
        return Path(parts[0]).expanduser() if len(parts) == 1 and not whole.exists() else whole
    except (RuntimeError, ValueError, OSError):  # no such user; one quote; too long
        return Path(text)


def save(terminal: TerminalChat, text: str) -> None:
    from minicpm_mlx.lm import sessions

    flags, typed = set[str](), text
    while (flag := typed.partition(" ")[0]) in ("-f", "-t"):
        flags.add(flag)
        typed = typed.removeprefix(flag).strip()
    overwrite = "-f" in flags
    path = typed_path(typed)
    name = str(path) if typed else terminal.name or sessions.new_name()
    suffix = path.suffix.lower()
    if suffix in DOCUMENTS or path.name.lower() == ".md":
        terminal.note("document", style="error", name=name)
    elif not terminal.chat.messages:
        terminal.note("no_turn", style="warning")
    elif suffix == ".md":
        _export(terminal, path, typed, overwrite=overwrite, thoughts="-t" in flags)
    elif terminal.autosave.save_as(terminal.chat, name, overwrite=overwrite):
        terminal.save_cache()
        terminal.note("saved", name=terminal.name)
    else:
        terminal.note("exists", style="error", name=name, typed=typed)


DOCUMENTS = (".txt", ".json", ".html", ".pdf", ".docx")
"""Suffixes of documents that cannot be exported; no session's name has them."""


def _export(
    terminal: TerminalChat, path: Path, typed: str, *, overwrite: bool, thoughts: bool
) -> None:
    from minicpm_mlx.lm import sessions

    chat = terminal.chat
    document = sessions.markdown(
        path.stem, chat.lm.card.name, chat.system, chat.messages, thoughts=thoughts
    )
    try:
        with path.open("w" if overwrite else "x", encoding="utf-8", errors="replace") as file:
            file.write(document)
    except FileExistsError:
        typed = f"-t {typed}" if thoughts else typed
        terminal.note("exists", style="error", name=path, typed=typed)
    except (OSError, ValueError) as error:
        _note_failed(terminal, path, error)
    else:
        terminal.note("exported", path=path)
