"""Saves conversations as readable JSON, with the key-value cache beside it if wanted.

Each file is written under a temporary name and then renamed, so that a full disk or a killed
process leaves the earlier one intact.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..arguments import is_whole, shown
from ..engine import Sampling
from ..errors import InvalidArgumentError, SessionError
from ..model_cards import cache_dir
from .attachments import without_files
from .chat import Chat
from .fingerprint import fingerprint
from .lm import LM, Message
from .user_data import SESSIONS, numbered, user_data

FORMAT = 1
_NAME = re.compile(r"[^\W_][\w .+-]{0,79}")

Version = tuple[int, int, int]  # inode, size, modification time in ns: each save changes it


@dataclass(kw_only=True)
class SavedSession:
    """A saved conversation; its fields are the keys of the JSON."""

    name: str
    model: str
    """Card name, repository or folder to load the model by."""
    identity: str
    """The model's fingerprint: weights, adapter, tokenizer and template."""
    updated: str
    """Time of saving, in ISO 8601."""
    adapter: str | None = None
    """Folder of the model's adapter."""
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    """Role and content; a reply's `reasoning_content` is its thought, and `tool_calls` its calls,
    whose results have the role "tool"."""
    forgotten: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    """Sampling by field, and max_tokens, stop, context, kv_bits, on_overflow, think, think_tokens,
    max_rounds."""
    format: int = FORMAT
    version: Version | None = field(default=None, init=False, compare=False)

    @property
    def title(self) -> str:
        """The first question's first line."""
        first = next((m["content"] for m in self.messages if m["role"] == "user"), "")
        return without_files(first)[1].strip().partition("\n")[0]

    @property
    def written(self) -> datetime:
        """Modification time of its file."""
        return datetime.fromtimestamp(self.version[2] / 1e9 if self.version else 0)

    def to_json(self) -> dict[str, Any]:
        """The JSON that it is saved as."""
        raw = asdict(self)
        del raw["version"]
        return raw

    def to_markdown(self, title: str, *, thoughts: bool = False) -> str:
        return markdown(title, self.model, self.system, self.messages, thoughts=thoughts)

    def take_unanswered(self) -> str:
        """Remove and return a last question without an answer; "" if there is none."""
        if not self.messages or self.messages[-1]["role"] != "user":
            return ""
        question = self.messages.pop()["content"]
        self.forgotten = min(self.forgotten, len(self.messages))
        return question


def directory() -> Path:
    """Folder of sessions; it may not exist yet."""
    return user_data() / SESSIONS


def path_of(name: str) -> Path:
    """The JSON file of a session; SessionError for a name that no file can have."""
    valid = _NAME.fullmatch(name) and not name.endswith((" ", "."))
    if not valid or len(name.encode()) > 240:  # file systems take 255, the suffix included
        raise SessionError(
            f"a session's name is up to 80 letters, digits, spaces and . + - _, got {name[:80]!r}"
        )
    return directory() / f"{name}.json"


def version(name: str) -> Version | None:
    """Identifies the content of a session's file, to notice changes; None if there is no file."""
    try:
        stat = path_of(name).stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def new_name() -> str:
    """An unused name: the current time."""
    stem = datetime.now().strftime("%Y-%m-%d %H.%M.%S")
    return next(name for name in numbered(stem) if version(name) is None)


def snapshot(chat: Chat) -> SavedSession:
    """The conversation as it would be saved, without name and time."""
    sampling = chat.lm.sampling if chat.sampling is None else chat.sampling
    return SavedSession(
        name="",
        model=_model_name(chat.lm),
        identity=fingerprint(chat.lm),
        adapter=str(chat.lm.adapter) if chat.lm.adapter else None,
        updated="",
        system=chat.system,
        messages=list(chat.messages),
        forgotten=chat.forgotten,
        settings=asdict(sampling) | {key: getattr(chat, key) for key in _CHAT_SETTINGS},
    )


def save(chat: Chat, name: str) -> Path:
    """Write the conversation, atomically replacing an earlier one of that name."""
    path, now = path_of(name), datetime.now(timezone.utc).isoformat(timespec="microseconds")
    raw = replace(snapshot(chat), name=name, updated=now).to_json()
    if problem := _problem(raw):
        raise SessionError(f"{path}: not saved, since it could not be read again ({problem})")
    text = json_text(raw)
    # A lone surrogate has no UTF-8; Python's backslash escape is also JSON's.
    write_file(
        path, lambda file: file.write_text(text, encoding="utf-8", errors="backslashreplace")
    )
    return path


def json_text(raw: dict[str, Any]) -> str:
    """JSON that people can read."""
    return json.dumps(raw, ensure_ascii=False, indent=2) + "\n"


def save_new(chat: Chat, name: str) -> str:
    """Save under `name` or, if taken, a variant of it; returns the name."""
    with _writing(path_of(name)):
        directory().mkdir(parents=True, exist_ok=True)
        name = next(free for free in numbered(name) if _claim(path_of(free)))
    try:
        save(chat, name)
    except BaseException:
        path_of(name).unlink(missing_ok=True)
        raise
    return name


def _claim(path: Path) -> bool:
    """Create the file; False if it exists. Of two processes at once, one succeeds."""
    try:
        path.touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        return False
    return True


def remove(name: str, *, conversation: bool = True) -> int:
    """Delete a session and its cache, or its cache alone, where they exist; the bytes freed."""
    freed = 0
    for path in (path_of(name), cache_path(name)) if conversation else (cache_path(name),):
        size = path.stat().st_size if path.exists() else 0
        with _writing(path, "deleted"):
            path.unlink(missing_ok=True)
        freed += size
    return freed


_CHAT_SETTINGS = (
    *("max_tokens", "stop", "context", "kv_bits", "on_overflow", "think", "think_tokens"),
    "max_rounds",
)
_MESSAGE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")


def load(name: str) -> SavedSession:
    """Read a session; SessionError if it is missing, damaged or not a session."""
    path, current = path_of(name), version(name)
    try:
        text = json.dumps(json.loads(path.read_text(encoding="utf-8")), ensure_ascii=False)
        # Replaces lone surrogates, which no tokenizer or terminal accepts.
        raw = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except FileNotFoundError:
        near = difflib.get_close_matches(name, names(), cutoff=0.0)
        nearest = f"; the nearest are {', '.join(map(repr, near))}" if near else ""
        raise SessionError(f"no session {name!r} in {directory()}{nearest}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SessionError(f"{path}: cannot be read ({error}); it was left as it is") from None
    if problem := _problem(raw):
        raise SessionError(f"{path}: {problem}; it was left as it is")
    known = {f.name for f in fields(SavedSession) if f.init}
    saved = SavedSession(
        **{key: value for key, value in raw.items() if key in known} | {"name": name}
    )
    saved.version = current  # from before reading, so that a change in between is noticed
    return saved


def listed() -> list[SavedSession]:
    """Every readable session, the newest first; SessionError if the folder cannot be read."""
    saved_sessions = []
    for name in names():
        with suppress(SessionError):
            saved_sessions.append(load(name))
    return sorted(saved_sessions, key=lambda saved: (saved.written, saved.updated), reverse=True)


def names() -> list[str]:
    """Names of all sessions, also of damaged ones."""
    try:
        return [path.stem for path in directory().iterdir() if path.suffix == ".json"]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SessionError(f"{directory()}: cannot be read ({error.strerror or error})") from None


def restore(saved: SavedSession, lm: LM, **changes: Any) -> Chat:
    """The conversation, continued with `lm`; `changes` that are not None replace settings and the
    system text."""
    settings = saved.settings | {key: v for key, v in changes.items() if v is not None}
    sampling = {f.name: settings[f.name] for f in fields(Sampling) if f.name in settings}
    if isinstance(bias := sampling.get("logit_bias"), dict):  # JSON's keys are strings
        sampling["logit_bias"] = {int(k) if str(k).isdecimal() else k: v for k, v in bias.items()}
    try:
        own = Sampling(**sampling)
        follows = lm.thinking_sampling is not None and own == lm.sampling  # the way to think
        return Chat(
            lm,
            system=changes.get("system") or saved.system,
            messages=[_restored(message) for message in saved.messages],
            forgotten=saved.forgotten,
            sampling=None if follows else own,
            **{key: settings[key] for key in _CHAT_SETTINGS if key in settings},
        )
    except InvalidArgumentError as error:
        raise SessionError(f"{path_of(saved.name)}: {error}") from None


def markdown(
    title: str,
    model: str,
    system: str | None,
    messages: Sequence[Message],
    *,
    thoughts: bool = False,
    words: tuple[str, str] = ("You", "thought"),
) -> str:
    """A conversation as a Markdown document, with or without the `thoughts` before answers.

    `words` are the names of the user and of a thought.
    """
    you, name = words
    parts = [f"# {title}", f"*{model}*"]
    if system:
        parts.append(_quoted(system))
    for message in messages:
        if message["role"] == "tool":
            parts.append(_quoted(message["content"].strip()))
            continue
        parts.append({"user": f"**{you}**", "assistant": f"**{model}**"}[message["role"]])
        if thoughts and (thought := message.get("reasoning_content")):
            parts.append(_quoted(f"*{name}*\n\n{thought.strip()}"))
        if answer := message["content"].strip():
            parts.append(answer)
        calls = message.get("tool_calls", [])
        for call in calls if _are_calls(calls) else ():
            function = call["function"]
            parts.append(f"`{function['name']}` `{function['arguments']}`")
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    return f"> {text}".replace("\n", "\n> ")


def cache_path(name: str) -> Path:
    """The file of a session's KV cache, which can be made again and so is in the cache folder."""
    return cache_directory() / f"{path_of(name).stem}.safetensors"


def cache_directory() -> Path:
    """Folder of kept KV caches; it may not exist yet."""
    return cache_dir() / SESSIONS


CACHE_LIMIT = 4 * 10**9
"""Bytes of all kept KV caches together. MiniCPM-2B takes 0.37 MB a token, so 1.5 GB in all."""


def cache_sizes() -> dict[Path, int]:
    """Bytes of each kept KV cache, the one used longest ago first.

    Caches of deleted sessions and what killed processes left are among them; what another process
    is writing is not. A folder that cannot be read holds none.
    """
    found, paths = [], list[Path]()
    with suppress(OSError):
        paths += cache_directory().glob("*.safetensors")
    for path in paths:
        with suppress(OSError):  # another process has just deleted it
            stat = path.stat()
            if not path.name.startswith(".") or time.time() - stat.st_mtime > 3600:
                found.append((stat.st_mtime_ns, path, stat.st_size))
    return {path: size for _, path, size in sorted(found)}


def make_room(path: Path | None = None, size: int | None = None) -> int:
    """Delete the caches used longest ago, so that all have at most CACHE_LIMIT bytes once `path`
    has `size`; by default all of them. Returns the bytes freed."""
    others = cache_sizes()
    if path is not None:
        others.pop(path, None)
    excess, freed = sum(others.values()) - (0 if size is None else CACHE_LIMIT - size), 0
    for other, bytes_ in others.items():
        if freed >= excess:
            break
        with suppress(OSError):
            other.unlink()
            freed += bytes_
    return freed


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    partial: Path | None = None
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
            os.close(handle)
            partial = Path(name)
            write(partial)
            partial.replace(path)
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path, done: str = "saved") -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # MLX raises the latter where the disk is full
        reason = getattr(error, "strerror", None) or error
        raise SessionError(
            f"{path}: could not be {done} ({reason}); what was saved before is still there"
        ) from None


def _model_name(lm: LM) -> str:
    card = lm.card
    revision = f"@{card.revision}" if card.name == card.repo and card.revision != "main" else ""
    return f"{card.path or card.name}{revision}"


def _problem(raw: Any) -> str | None:
    """The fault in the JSON of a session, or None."""
    if not isinstance(raw, dict) or "messages" not in raw or "format" not in raw:
        return "this is no saved session"
    if raw["format"] != FORMAT:
        return (
            f"written by another version (format {shown(raw['format'])}; this one reads {FORMAT})"
        )
    texts = ("model", "identity", "updated")
    sound = all(isinstance(raw.get(key), str) for key in texts)
    sound = sound and all(isinstance(raw.get(key), str | None) for key in ("system", "adapter"))
    sound = sound and isinstance(raw.get("settings", {}), dict)
    messages = raw["messages"]
    sound = sound and isinstance(messages, list) and all(map(_is_message, messages))
    forgotten = raw.get("forgotten", 0)
    sound = sound and is_whole(forgotten) and 0 <= forgotten <= len(messages)
    return None if sound else "damaged"


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("user", "assistant", "tool")
        and isinstance(message.get("content"), str)
        and isinstance(message.get("reasoning_content", ""), str)
    )


def _restored(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with the fields that are read, if they are sound."""
    kept = {key: message[key] for key in _MESSAGE_KEYS if key in message}
    if not _are_calls(kept.get("tool_calls", [])):
        del kept["tool_calls"]
    return kept


def _are_calls(calls: Any) -> bool:
    return isinstance(calls, list) and all(
        isinstance(call, dict)
        and isinstance(call.get("id"), str)
        and isinstance(function := call.get("function"), dict)
        and all(isinstance(function.get(key), str) for key in ("name", "arguments"))
        for call in calls
    )
