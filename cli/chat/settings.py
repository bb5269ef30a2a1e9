"""Settings of a chat as text: as /show prints them, and as /set reads them back."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..options import unescape

if TYPE_CHECKING:
    from minicpm_mlx import Chat

CHAT_SETTINGS = (
    *("max_tokens", "stop", "context", "on_overflow", "kv_bits", "think_tokens", "max_rounds"),
)
WHOLE = ("top_k", "seed", "max_tokens", "context", "kv_bits", "think_tokens", "max_rounds")
NONE = ("none", "off", "-")


def settings(chat: Chat) -> dict[str, Any]:
    """Settings that /set changes, by name."""
    return asdict(chat.current_sampling) | {name: getattr(chat, name) for name in CHAT_SETTINGS}


def setting_text(value: object) -> str:
    """A value as /set takes it; "-" where there is none."""
    if isinstance(value, (list, tuple, Mapping)):
        return json.dumps(value, ensure_ascii=False) if value else "-"
    return "-" if value is None else str(value)


def parse_setting(name: str, value: str) -> Any:
    """A setting's value as typed; its limits are checked where it is used.

    ValueError for text of another kind, which `expected` names.
    """
    if name == "on_overflow":
        return value
    if name == "stop":
        return [] if value in NONE else _stop_strings(value)
    if name == "logit_bias":
        return {} if value in NONE else {int(key): bias for key, bias in _biases(value)}
    if value in NONE and name in WHOLE and name != "top_k":
        return None
    return int(value) if name in WHOLE else float(value)


def expected(name: str) -> str:
    """Key of the interface text that says what the setting takes."""
    return "whole" if name in WHOLE else name if name in ("stop", "logit_bias") else "number"


def _stop_strings(text: str) -> list[str]:
    """One string as it is typed, several in quotes, or a list in JSON as /show prints it."""
    if text.startswith("["):
        try:
            strings = json.loads(text)
        except ValueError:
            return unescape([text])
        if not isinstance(strings, list) or not all(isinstance(one, str) for one in strings):
            raise ValueError
        return strings
    return unescape(shlex.split(text) if text[0] in "\"'" else [text])


def _biases(text: str) -> Any:
    biases = json.loads(text)
    if not isinstance(biases, dict):
        raise ValueError
    return biases.items()
