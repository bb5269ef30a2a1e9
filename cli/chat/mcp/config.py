"""The file of `chat --mcp`: servers of tools by name, in the usual `mcpServers` JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minicpm_mlx.arguments import shown
from minicpm_mlx.errors import FileError, InvalidArgumentError


@dataclass(frozen=True, kw_only=True)
class McpServer:
    """An entry of a file: a program to run, or an address."""

    name: str
    command: str | None = None
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def read_servers(path: Path) -> list[McpServer]:
    """The servers of a file in the usual form: `{"mcpServers": {"name": {"command": ...}}}`.

    `${NAME}` in values is that variable of the environment. Raises FileError.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise FileError(f"could not be read ({error.strerror})").at(path) from None
    except (ValueError, RecursionError) as error:
        raise FileError(f"must be JSON ({error})").at(path) from None
    servers = None
    if isinstance(content, Mapping):
        servers = content.get("mcpServers", content.get("servers"))
    if not isinstance(servers, Mapping) or not servers:
        raise FileError('must have servers by name in "mcpServers"').at(path)
    try:
        return [
            _entry(str(name), value)
            for name, value in servers.items()
            if not (isinstance(value, Mapping) and value.get("disabled") is True)
        ]
    except InvalidArgumentError as error:
        raise FileError(str(error)).at(path) from None


_TEXTS = {"command": str, "cwd": str, "url": str, "args": list, "env": dict, "headers": dict}


def _entry(name: str, value: object) -> McpServer:
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(f"server {shown(name)} must be an object, got {shown(value)}")
    if (kind := value.get("type", value.get("transport"))) not in (
        *(None, "stdio", "http", "streamable-http", "streamableHttp"),
    ):
        raise InvalidArgumentError(f"server {name}: type must be stdio or http, got {shown(kind)}")
    given: dict[str, Any] = {}
    for key, wanted in _TEXTS.items():
        item = value.get(key, value.get("serverUrl") if key == "url" else None)
        if item is None:
            continue
        parts = [item] if wanted is str else item.values() if wanted is dict else item
        if not isinstance(item, wanted) or not all(isinstance(part, str) for part in parts):
            what = {str: "text", list: "a list of texts", dict: "an object of texts"}[wanted]
            raise InvalidArgumentError(f"server {name}: {key} must be {what}, got {shown(item)}")
        given[key] = _expanded(name, item)
    if bool(given.get("command")) == bool(given.get("url")):
        raise InvalidArgumentError(f"server {name}: expected either a command or a url")
    if "url" in given and not given["url"].startswith(("http://", "https://")):
        raise InvalidArgumentError(
            f"server {name}: url must begin with http:// or https://, got {shown(given['url'])}"
        )
    for key, text in given.get("headers", {}).items():
        if not (text.isascii() and text.isprintable()):  # not shown: it may be a secret
            raise InvalidArgumentError(
                f"server {name}: header {shown(key)} must be plain ASCII on one line"
            )
    return McpServer(name=name, **given)


def _expanded(server: str, item: Any) -> Any:
    """`item` with `${NAME}` replaced by that variable of the environment."""
    if isinstance(item, dict):
        return {key: _expanded(server, part) for key, part in item.items()}
    if isinstance(item, list):
        return [_expanded(server, part) for part in item]

    def variable(match: re.Match[str]) -> str:
        value = os.environ.get(match["name"], match["default"])
        if value is None:
            raise InvalidArgumentError(
                f"server {server}: the variable {match['name']} is not set; set it, or give "
                f"${{{match['name']}:-a default}}"
            )
        return value

    return re.sub(r"\$\{(?:env:)?(?P<name>\w+)(?::-(?P<default>[^}]*))?\}", variable, item)
