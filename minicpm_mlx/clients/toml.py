"""TOML, changed in place by tomlkit, which keeps comments and order."""

from __future__ import annotations

from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from minicpm_mlx.errors import InvalidArgumentError


def parse(text: str) -> Any:
    """The value of a text."""
    try:
        return tomlkit.parse(text).unwrap()
    except (TOMLKitError, RecursionError, ValueError) as error:
        raise InvalidArgumentError(" ".join(str(error).split())) from None


def update(text: str, new: dict[str, Any]) -> str:
    """The text with `new` merged in."""
    document = tomlkit.parse(text)
    _merge(document, new)
    return tomlkit.dumps(document)


def _merge(old: Any, new: dict[str, Any]) -> None:
    for name, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(name), dict):
            _merge(old[name], value)
        elif old.get(name) != value:
            old[name] = value
