"""What a server sends, mended where one bad part would cost all the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from minicpm_mlx.arguments import printable

LOOSE_HALVES = re.compile("[\ud800-\udfff]")


class MendedStream:
    """A stream of a server's messages.

    A tool without a name, or whose schema is malformed, is left out of its list, as one such would
    cost all of them: `left_out` is told its name and why. Half of a surrogate pair, as programs in
    JavaScript leave it when they cut a text, becomes U+FFFD.
    """

    def __init__(self, stream: Any, left_out: Callable[[str, str], None]) -> None:
        self._stream, self._left_out = stream, left_out

    @property
    def last_context(self) -> Any:
        return getattr(self._stream, "last_context", None)

    async def receive(self) -> Any:
        return self._mended(await self._stream.receive())

    async def aclose(self) -> None:
        await self._stream.aclose()

    def __aiter__(self) -> MendedStream:
        return self

    async def __anext__(self) -> Any:
        return self._mended(await self._stream.__anext__())

    async def __aenter__(self) -> MendedStream:
        await self._stream.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> bool | None:
        ended: bool | None = await self._stream.__aexit__(*error)
        return ended

    def _mended(self, item: Any) -> Any:
        if isinstance(item, Exception):
            item = _read_again(item)
        result = getattr(getattr(item, "message", None), "result", None)
        if isinstance(result, dict) and isinstance(tools := result.get("tools"), list):
            result["tools"] = [tool for one in tools if (tool := self._tool(one))]
        return item

    def _tool(self, tool: Any) -> dict[str, Any] | None:
        """The fields of a tool that are used; None for one that cannot be."""
        name = tool.get("name") if isinstance(tool, Mapping) else None
        if not isinstance(name, str):
            self._left_out(printable(name), "it has no name")
            return None
        schema, description = tool.get("inputSchema"), tool.get("description")
        if problem := _problem(schema):
            self._left_out(printable(name), problem)
            return None
        text = description if isinstance(description, str) else ""
        return {"name": name, "description": text, "inputSchema": {**schema, "type": "object"}}


def _problem(schema: Any) -> str | None:
    """What is wrong with the schema of a tool's arguments, as far as templates look at it."""
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        return "inputSchema must be a schema of an object"
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, Mapping) or not all(
        isinstance(one, Mapping | bool) for one in properties.values()
    ):
        return "properties of inputSchema must be schemas by name"
    if not isinstance(required, list) or not all(isinstance(one, str) for one in required):
        return "required of inputSchema must be a list of names"
    return None


def _read_again(error: Exception) -> Any:
    """A message that was refused for a loose half of a surrogate pair; else the error."""
    from mcp.shared.message import SessionMessage
    from mcp.types import jsonrpc_message_adapter

    try:
        line = error.errors()[0]["input"]  # type: ignore[attr-defined]  # of pydantic
        whole = json.dumps(json.loads(line), ensure_ascii=False)
        message = jsonrpc_message_adapter.validate_json(
            LOOSE_HALVES.sub("\ufffd", whole), by_name=False
        )
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
        return error
    return SessionMessage(message)
