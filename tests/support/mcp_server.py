"""An MCP server over standard input and output, as good or bad as its first argument says."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

KIND = sys.argv[1]
TEXT = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}

CONTENTS: dict[str, list[dict[str, Any]]] = {
    "escapes": [
        {"type": "text", "text": "\x1b[2J\u202eDry [red]in[/red] {x}\x07\n" + "more\n" * 40}
    ],
    "half": [{"type": "text", "text": "Dry \ud83d"}],
    "nothing": [],
    "parts": [
        {"type": "image", "data": "AAAA", "mimeType": "image/png"},
        {"type": "resource", "resource": {"uri": "file:///a.txt", "text": "Dry"}},
        {"type": "resource_link", "uri": "file:///b.txt", "name": "b"},
    ],
}
"""Results of the kinds that are named after them."""

if KIND == "keyless" and "WEATHER_KEY" not in os.environ:
    sys.exit("WEATHER_KEY must be set")


def tools() -> list[dict[str, Any]]:
    if KIND == "many":
        return [
            {"name": f"tool_{i}", "description": f"No. {i}", "inputSchema": {"type": "object"}}
            for i in range(1000)
        ]
    if KIND == "odd":
        return [
            {"name": "two words", "inputSchema": TEXT},
            {"name": "fine", "inputSchema": {"type": "object"}},
        ]
    if KIND == "malformed":
        schemas: list[Any] = [
            *(None, 7, {"type": "array"}, {"properties": ["place"]}, {"properties": {"place": 7}}),
            {"properties": {"place": {}}, "required": "place"},
        ]
        tools = [{"name": f"tool_{i}", "inputSchema": schemas[i]} for i in range(len(schemas))]
        odd = {"title": 7, "outputSchema": 7, "description": ["x"], "inputSchema": {}}
        return [*tools, {"inputSchema": TEXT}, {"name": "fine", **odd}]
    if KIND == "escapes":
        text = "\x1b]0;mine\x07\x1b[2J[bold]The\u202e weather[/bold] {place} :smile: </tools>"
        return [{"name": "weather", "description": text, "inputSchema": TEXT}]
    if KIND == "twice":
        return [{"name": "weather", "inputSchema": TEXT}] * 2
    return [{"name": "weather", "description": "The weather of a place.", "inputSchema": TEXT}]


def answer(method: str, params: dict[str, Any]) -> dict[str, Any]:
    if method == "initialize":
        if KIND == "silent":
            time.sleep(60)
        return {
            "protocolVersion": params["protocolVersion"],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": KIND, "version": "1"},
        }
    if method == "tools/list":
        return {"tools": tools()}
    if KIND == "dies":
        print("I am out of cheese", file=sys.stderr)
        sys.exit(3)
    if KIND == "hangs":
        time.sleep(60)
    if KIND == "junk":
        print("this is no JSON", flush=True)
        sys.stdout.buffer.write(b"\xff\xfe\n")
    if KIND in CONTENTS:
        return {"content": CONTENTS[KIND]}
    text = f"Dry in {params['arguments'].get('place')}" * (20_000 if KIND == "long" else 1)
    content = [{"type": "text", "text": text}]
    return {"content": content, "isError": KIND == "fails"}


for line in sys.stdin:
    message = json.loads(line)
    if "id" not in message:
        continue
    known = message["method"] in ("initialize", "tools/list", "tools/call")
    reply: dict[str, Any] = {"jsonrpc": "2.0", "id": message["id"]}
    if known:
        reply["result"] = answer(message["method"], message.get("params") or {})
    else:
        reply["error"] = {"code": -32601, "message": "no such method"}
    print(json.dumps(reply), flush=True)
