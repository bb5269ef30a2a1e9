"""The chat's commands that read and write files: /attach and /save."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .conversation import TerminalChat


def attach(talk: TerminalChat, text: str) -> None:
    from minicpm_mlx.lm.attachments import with_files

    if not text or text == "off":
        if text:
            talk.attached.clear()
        for file in talk.attached:
            waiting = talk.say.some("token", count(talk, with_files([file], "")))
            talk.note("attached", name=file[0], tokens=waiting)
        if not talk.attached:
            talk.note("dropped" if text else "no_files")
        return
    path = typed_path(text)
    room = _room(talk)
    try:
        if path.exists() and not path.is_file():  # a device would never end
            talk.note("no_file", style="error", path=path)
            return
        size = path.stat().st_size
        body = path.read_text(encoding="utf-8-sig") if size <= 100 * room else None
    except UnicodeDecodeError:
        talk.note("binary", style="error", path=path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        talk.note("failed", style="error", path=path, reason=reason)
    else:
        # A name that is no text is sent as near as can be: neither a newline nor a stray byte.
        name = "".join(char if char.isprintable() else "\ufffd" for char in path.name)
        if body is not None and not body.strip():
            talk.note("empty", style="error", path=path)
        elif (name, body) in talk.attached:
            talk.note("waits", style="error", name=name)
        elif body is None or (tokens := count(talk, with_files([(name, body)], ""))) >= room:
            many = size // 4 if body is None else tokens  # not worth reading: it could not fit
            talk.note("too_long", style="error", path=path, count=many, room=room)
        else:
            talk.attached.append((name, body))
            talk.note("attached", name=name, tokens=talk.say.some("token", tokens))


def _room(talk: TerminalChat) -> int:
    """Tokens that one more file may have."""
    from minicpm_mlx.lm.attachments import with_files

    chat = talk.chat
    used = chat.tokens() if chat.on_overflow == "stop" else 0  # else older turns make room
    return max(chat.context_length - used - count(talk, with_files(talk.attached, "")), 0)


def count(talk: TerminalChat, text: str) -> int:
    return len(talk.chat.lm.tokenizer.encode(text, add_bos=False))


def typed_path(text: str) -> Path:
    """A path as typed, or as a terminal writes one that is dropped on it: quoted, or with \\."""
    try:
        whole, parts = Path(text).expanduser(), shlex.split(text)
        return Path(parts[0]).expanduser() if len(parts) == 1 and not whole.exists() else whole
    except (RuntimeError, ValueError, OSError):  # no such user; one quote; too long
        return Path(text)


def save(talk: TerminalChat, text: str) -> None:
    from minicpm_mlx.lm import sessions

    flag, _, rest = text.partition(" ")
    over = flag == "-f"
    typed = rest.strip() if over else text
    path = typed_path(typed)
    name = str(path) if typed else talk.name or sessions.new_name()
    suffix = path.suffix.lower()
    if suffix in NO_SESSION or path.name.lower() == ".md":
        talk.note("document", style="error", name=name)
    elif not talk.chat.messages:
        talk.note("no_turn", style="warning")
    elif suffix == ".md":
        _export(talk, path, typed, over)
    elif talk.keeper.save_as(talk.chat, name, over=over):
        talk.keep_cache()
        talk.note("saved", name=talk.name)
    else:
        talk.note("exists", style="error", name=name, typed=typed)


NO_SESSION = (".txt", ".json", ".html", ".pdf", ".docx")
"""Endings that say that a document is meant, of a kind that is not written here."""


def _export(talk: TerminalChat, path: Path, typed: str, over: bool) -> None:
    from minicpm_mlx.lm import sessions

    document = sessions.markdown(talk.chat, path.stem)
    try:
        with path.open("w" if over else "x", encoding="utf-8", errors="replace") as file:
            file.write(document)
    except FileExistsError:
        talk.note("exists", style="error", name=path, typed=typed)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        talk.note("failed", style="error", path=path, reason=reason)
    else:
        talk.note("exported", path=path)
