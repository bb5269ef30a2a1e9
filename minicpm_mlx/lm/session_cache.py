"""Saves and restores a session's key-value cache, beside or apart from its conversation."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..engine import KVCache, Session
from ..weights.lazy_tensor import LazyTensor
from ..weights.safetensors import read
from . import sessions
from .chat import Chat
from .fingerprint import fingerprint
from .lm import LM
from .sessions import cache_path, make_room, write_file


def save_cache(chat: Chat, name: str) -> Path | None:
    """Save the cache of the session, so that continuing reads no turn again.

    The caches used longest ago are deleted for it; None if it alone is larger than CACHE_LIMIT.
    """
    session = chat.session
    if session.cache[0].offset != len(session.ids):  # a step was interrupted
        session.rewind([*session.ids, 0])
    arrays = {"ids": mx.array(session.ids, mx.int32)}
    for number, layer in enumerate(session.cache):
        parts = [*layer.used(layer.keys), *layer.used(layer.values)]
        arrays |= {f"{number}.{part}": array for part, array in enumerate(parts)}
    facts = {"identity": fingerprint(chat.lm), "length": str(session.length)}
    path = cache_path(name)
    size = sum(array.nbytes for array in arrays.values()) + 2**16  # more than the file's header has
    if size > sessions.CACHE_LIMIT:
        return None
    make_room(path, size)
    write_file(path, lambda file: mx.save_safetensors(str(file), arrays, facts))
    return path


def restore_cache(chat: Chat, name: str) -> str | None:
    """Use the cache saved with session `name`; returns None, or the reason why it is not used."""
    path = cache_path(name)
    if not path.exists():
        return "no cache was kept"
    session = chat.lm.session(chat.kv_bits)
    try:
        reason = _fill(session, chat.lm, path)
    except Exception as error:  # a damaged file may raise anything; the chat works without it
        reason = f"{path}: damaged ({type(error).__name__})"
    if reason is None:
        chat.session = session
        with suppress(OSError):  # a cache of others may be read and not written
            os.utime(path)  # it was used now
    return reason


def _fill(session: Session, lm: LM, path: Path) -> str | None:
    """Load the cache at `path` into a new session; returns the reason if it does not fit."""
    tensors = read(path)
    loaded: Any = mx.load(str(path), return_metadata=True)
    facts = loaded[1]
    if facts.get("identity") != fingerprint(lm):
        return "weights, adapter, tokenizer or template are others than those it was made with"
    if {name: (t.shape, t.dtype) for name, t in tensors.items()} != _expected(session, tensors):
        return "it was made with another kv_bits or is damaged"
    arrays = {name: tensor.load() for name, tensor in tensors.items()}
    mx.eval(arrays)
    for number, layer in enumerate(session.cache):
        parts = range(2 if layer.bits is None else 6)
        layer.restore([arrays[f"{number}.{part}"] for part in parts])
    ids: Any = arrays["ids"].tolist()
    session.ids, session.length = ids, int(facts["length"])
    session.model, session.adapter = lm.model, lm.model.adapter
    return None


def _expected(
    session: Session, tensors: dict[str, LazyTensor]
) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
    """Shapes and dtypes of a complete cache for as many ids as `tensors` has."""
    (count,) = tensors["ids"].shape
    floats = [t.dtype for t in tensors.values() if mx.issubdtype(t.dtype, mx.floating)]
    layer = KVCache(session.cache[0].bits)
    heads, *widths = session.config.cache_shape
    layer.append(*(mx.zeros((1, heads, 1, width), floats[0]) for width in widths))
    expected: dict[str, tuple[tuple[int, ...], mx.Dtype]] = {"ids": ((count,), mx.int32)}
    for number in range(len(session.cache)):
        for part, like in enumerate(layer.state):
            B, K, _, D = like.shape
            expected[f"{number}.{part}"] = ((B, K, count, D), like.dtype)
    return expected
