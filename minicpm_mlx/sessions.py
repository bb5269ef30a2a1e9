"""Conversations on disk: readable JSON, and beside it, where wanted, the key-value cache.

Each file is written under another name and then renamed, so that a full disk or a killed process
leaves the one that was there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import mlx.core as mx

from .chat import Chat
from .engine import Sampling
from .errors import InvalidArgumentError, MiniCPMError, SessionError
from .lm import LM
from .registry import cache_dir
from .weights.load import parameters
from .weights.safetensors import read

FORMAT = 1
_NAME = re.compile(r"[^\W_][\w .+-]{0,79}")


@dataclass(kw_only=True)
class Saved:
    """A conversation as it is kept."""

    name: str
    model: str
    """Card name, repository or folder, to load the model by."""
    identity: str
    """Changes with the weights, the tokenizer and the template; see `identity`."""
    updated: str
    """When, in ISO 8601."""
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    forgotten: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    """Sampling by field, and max_tokens, context, kv_bits, on_overflow."""
    format: int = FORMAT

    @property
    def title(self) -> str:
        """The first question's first line."""
        first = next((m["content"] for m in self.messages if m["role"] == "user"), "")
        return first.strip().partition("\n")[0]


def directory() -> Path:
    """Where sessions are kept; it may not exist yet."""
    return cache_dir() / "sessions"


def path_of(name: str) -> Path:
    """The JSON file of a session; SessionError for what cannot be a file's name."""
    if not _NAME.fullmatch(name) or name.endswith((" ", ".")):
        raise SessionError(
            f"a session's name is up to 80 letters, digits, spaces and . + - _, got {name[:80]!r}"
        )
    return directory() / f"{name}.json"


def new_name() -> str:
    """A name that no session has: the time."""
    stem = datetime.now().strftime("%Y-%m-%d %H.%M.%S")
    names = (stem, *(f"{stem}-{n}" for n in range(2, 1000)))
    return next(name for name in names if not path_of(name).exists())


def save(chat: Chat, name: str) -> Path:
    """Write the conversation; what was kept under that name is replaced, wholly or not at all."""
    how = chat.lm.sampling if chat.sampling is None else chat.sampling
    saved = Saved(
        name=name,
        model=_model_name(chat.lm),
        identity=identity(chat.lm),
        updated=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        system=chat.system,
        messages=chat.messages,
        forgotten=chat.forgotten,
        settings=asdict(how) | {key: getattr(chat, key) for key in _CHAT_SETTINGS},
    )
    text = json.dumps(asdict(saved), ensure_ascii=False, indent=2) + "\n"
    path = path_of(name)
    _write(path, lambda file: file.write_text(text, encoding="utf-8"))
    return path


_CHAT_SETTINGS = ("max_tokens", "context", "kv_bits", "on_overflow")


def load(name: str) -> Saved:
    """Read a session; SessionError where there is none, or it is damaged or foreign."""
    path = path_of(name)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SessionError(f"no session {name!r} in {directory()}; /sessions lists them") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SessionError(f"{path}: cannot be read ({error}); it was left as it is") from None
    problem = _problem(raw)
    if problem:
        raise SessionError(f"{path}: {problem}; it was left as it is")
    known = {f.name for f in fields(Saved)}
    return Saved(**{key: value for key, value in raw.items() if key in known} | {"name": name})


def listed() -> list[Saved]:
    """Every session that can be read, the last one first."""
    found = []
    for path in directory().glob("*.json"):
        with suppress(SessionError):
            found.append(load(path.stem))
    return sorted(found, key=lambda saved: saved.updated, reverse=True)


def restore(saved: Saved, lm: LM, **changes: Any) -> Chat:
    """The conversation with `lm`; `changes` replace settings (those that are None do not)."""
    settings = saved.settings | {key: v for key, v in changes.items() if v is not None}
    sampling = {f.name: settings[f.name] for f in fields(Sampling) if f.name in settings}
    try:
        return Chat(
            lm,
            system=saved.system,
            messages=[dict(message) for message in saved.messages],
            forgotten=saved.forgotten,
            sampling=Sampling(**sampling),
            **{key: settings[key] for key in _CHAT_SETTINGS if key in settings},
        )
    except InvalidArgumentError as error:
        raise SessionError(f"{path_of(saved.name)}: {error}") from None


def markdown(chat: Chat, title: str) -> str:
    """The conversation as a Markdown document."""
    parts = [f"# {title}", f"*{chat.lm.card.name}*"]
    if chat.system:
        parts.append(f"> {chat.system}".replace("\n", "\n> "))
    for message in chat.messages:
        head = {"user": "**You**", "assistant": f"**{chat.lm.card.name}**"}[message["role"]]
        parts += [head, message["content"].strip()]
    return "\n\n".join(parts) + "\n"


# The key-value cache


def cache_path(name: str) -> Path:
    return path_of(name).with_suffix(".safetensors")


def save_cache(chat: Chat, name: str) -> Path:
    """Keep the cache beside the session, so that going on reads nothing again."""
    session = chat.session
    if session.cache[0].offset != len(session.ids):  # a step was broken off
        session.rewind([*session.ids, 0])
    arrays = {"ids": mx.array(session.ids, mx.int32)}
    for number, layer in enumerate(session.cache):
        parts = [*layer.used(layer.keys), *layer.used(layer.values)]
        arrays |= {f"{number}.{part}": array for part, array in enumerate(parts)}
    facts = {"identity": identity(chat.lm), "length": str(session.length)}
    path = cache_path(name)
    _write(path, lambda file: mx.save_safetensors(str(file), arrays, facts))
    return path


def restore_cache(chat: Chat, name: str) -> str | None:
    """Take up the cache kept with session `name`; why it was not, or None if it was."""
    path = cache_path(name)
    if not path.exists():
        return "no cache was kept"
    try:
        tensors = read(path)
        loaded: Any = mx.load(str(path), return_metadata=True)
        facts = loaded[1]
        if facts.get("identity") != identity(chat.lm):
            return "weights, tokenizer or template are others than those it was made with"
        session = chat.session
        ids: Any = tensors["ids"].load().tolist()
        for number, layer in enumerate(session.cache):
            count = sum(name.startswith(f"{number}.") for name in tensors)
            arrays = [tensors[f"{number}.{part}"].load() for part in range(count)]
            wanted = 2 if layer.bits is None else 6
            shapes = {array.shape[:3] for array in arrays}
            if count != wanted or shapes != {(1, chat.lm.config.num_key_value_heads, len(ids))}:
                return "it was made with another kv_bits or is damaged"
            mx.eval(arrays)
            layer.restore(arrays)
        session.ids, session.length = ids, int(facts["length"])
        session.model = chat.lm.model
    except (MiniCPMError, KeyError, ValueError, RuntimeError, TypeError) as error:
        chat.session = chat.lm.session(chat.kv_bits)
        return f"{path}: damaged ({type(error).__name__})"
    return None


def identity(lm: LM) -> str:
    """A hash of what decides an answer: weights, config, tokenizer, template, number format.

    Of large files it takes the size and samples all over, not each byte: a moment for gigabytes.
    """
    digest = hashlib.sha256(str(FORMAT).encode())
    template = lm.tokenizer.template
    digest.update((template.source if template else "").encode())
    dtypes = {str(array.dtype) for array in parameters(lm.model).values()}
    digest.update(f"{type(lm.model).__name__} {sorted(dtypes)}".encode())
    for file in sorted(lm.folder.iterdir()) if lm.folder else ():
        if file.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja", ".gguf"):
            digest.update(file.name.encode())
            _sample(file, digest)
    return digest.hexdigest()[:32]


def _sample(file: Path, digest: Any) -> None:
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    block, most = 1 << 14, 128
    with file.open("rb") as data:
        if size <= block * most:
            digest.update(data.read())
            return
        for number in range(most):
            data.seek((size - block) * number // (most - 1))
            digest.update(data.read(block))


# Files


def _write(path: Path, write: Callable[[Path], object]) -> None:
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent
        )
        os.close(handle)
        partial = Path(name)
        write(partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:  # MLX raises the latter where the disk is full
        reason = getattr(error, "strerror", None) or error
        raise SessionError(
            f"{path}: could not be saved ({reason}); what was saved before is still there"
        ) from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _model_name(lm: LM) -> str:
    return str(lm.card.path or lm.card.name)


def _problem(raw: Any) -> str | None:
    """What is wrong with the JSON of a session."""
    if not isinstance(raw, dict) or "messages" not in raw or "format" not in raw:
        return "this is no saved session"
    if raw["format"] != FORMAT:
        return f"written by another version (format {raw['format']!r}; this one reads {FORMAT})"
    texts = ("model", "identity", "updated")
    sound = all(isinstance(raw.get(key), str) for key in texts)
    sound = sound and isinstance(raw.get("system"), str | None)
    sound = sound and isinstance(raw.get("settings", {}), dict)
    messages = raw["messages"]
    sound = sound and isinstance(messages, list) and all(map(_is_message, messages))
    forgotten = raw.get("forgotten", 0)
    sound = sound and isinstance(forgotten, int) and 0 <= forgotten <= len(messages)
    return None if sound else "damaged"


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ("user", "assistant")
        and isinstance(message.get("content"), str)
    )
