"""An MCP server over standard input and output, as good or bad as its first argument says."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

KIND = sys.argv[1]
TEXT = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}


def tools() -> list[dict[str, Any]]:
    if KIND == "many":
        return [
            {"name": f"tool_{i}", "description": f"Number {i}.", "inputSchema": TEXT}
            for i in range(1000)
        ]
    if KIND == "odd":
        return [
            {"name": "two words", "inputSchema": TEXT},
            {"name": "fine", "inputSchema": {"type": "object"}},
        ]
    if KIND == "broken":
        return [{"name": "no_schema"}]
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
