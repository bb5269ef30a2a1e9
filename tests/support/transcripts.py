"""Exchanges with the server as text to review, and streams put together into whole replies."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from .apis import sse
from .serving import Answer

JsonDict = dict[str, Any]

_CHANGING = re.compile(
    r"(?P<id>(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f]))"
    r'|"(?P<name>created|created_at|completed_at|e2e_latency|\w+_duration)":'
    r'(?P<value>[\d.e-]+|"[^"]+")'
)


def normalise(text: str) -> str:
    """Numbers ids in the order in which they are met, and makes times and durations 0."""
    seen: dict[str, str] = {}

    def replaced(found: re.Match[str]) -> str:
        if found["id"]:
            return seen.setdefault(found["id"], f"<{len(seen) + 1}>")
        text = found["value"].startswith('"')
        value = re.sub(r"\d", "0", found["value"]) if text else "0"
        return f'"{found["name"]}":{value}'

    return _CHANGING.sub(replaced, text)


def shown(answer: Answer) -> str:
    """Status, kind and all bytes of a response, but for ids and times."""
    kind = answer.headers["content-type"]
    return f"{answer.status} {kind}\n{normalise(answer.body.decode())}"


def compact(body: Mapping[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))


def comparable(reply: Any) -> Any:
    """A reply whose ids and times are normalised, for ==."""
    return json.loads(normalise(json.dumps(reply, separators=(",", ":"), sort_keys=True)))


def assemble(path: str, content: bytes) -> Any:
    """The whole reply that a stream's parts make."""
    return _ASSEMBLERS[path](content)


def _chat(content: bytes) -> JsonDict:
    *chunks, last = sse(content)
    choices: dict[int, JsonDict] = {}
    for chunk in chunks:
        assert [chunk[name] for name in ("id", "created", "model")] == [
            last[name] for name in ("id", "created", "model")
        ]
        (part,) = chunk["choices"]
        empty = {"index": part["index"], "message": {}, "logprobs": None}
        choice = choices.setdefault(part["index"], empty)
        assert choice.get("finish_reason") is None
        choice["finish_reason"] = part["finish_reason"]
        if part["logprobs"]:
            found = choice["logprobs"] or {"content": [], "refusal": None}
            choice["logprobs"] = {
                **found,
                "content": found["content"] + part["logprobs"]["content"],
            }
        delta = dict(part["delta"])
        for call in delta.pop("tool_calls", ()):
            calls = choice["message"].setdefault("tool_calls", [])
            if call["index"] == len(calls):
                calls.append({"id": call["id"], "type": call["type"], "function": call["function"]})
            else:
                assert call.keys() == {"index", "function"}
                assert call["function"].keys() == {"arguments"}
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        _join(choice["message"], delta)
    return last | {"object": "chat.completion", "choices": [choices[i] for i in sorted(choices)]}


def _join(texts: JsonDict, delta: Mapping[str, Any]) -> None:
    for name, value in delta.items():
        texts[name] = texts.get(name, "") + value


def _completions(content: bytes) -> JsonDict:
    *chunks, last = sse(content)
    choices: dict[int, JsonDict] = {}
    for chunk in chunks:
        (part,) = chunk["choices"]
        before = choices.get(part["index"], {"text": "", "logprobs": None})
        logprobs = before["logprobs"]
        for name, values in (part["logprobs"] or {}).items():
            logprobs = {**(logprobs or {}), name: (logprobs or {}).get(name, []) + values}
        text = before["text"] + part["text"]
        choices[part["index"]] = part | {"text": text, "logprobs": logprobs}
    return last | {"choices": [choices[i] for i in sorted(choices)]}


def _responses(content: bytes) -> JsonDict:
    events = sse(content)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    output: list[JsonDict] = []
    for event in events[:-1]:
        kind, item = event["type"], output[-1] if output else {}
        if "output_index" in event and kind != "response.output_item.added":
            assert event["output_index"] == len(output) - 1
            assert event.get("item_id", item["id"]) == item["id"]
        match kind.removeprefix("response.").split("."):
            case ["output_item", "added"]:
                output.append(event["item"])
            case ["output_item", "done"]:
                assert item | {"status": event["item"]["status"]} == event["item"]
                output[-1] = event["item"]
            case ["content_part", "added"]:
                item["content"].append(event["part"])
            case ["content_part", "done"]:
                assert item["content"][event["content_index"]] == event["part"]
            case ["function_call_arguments", "delta"]:
                item["arguments"] += event["delta"]
            case ["function_call_arguments", "done"]:
                assert item["arguments"] == event["arguments"]
            case [_, "delta"]:
                part = item["content"][event["content_index"]]
                part["text"] += event["delta"]
                if "logprobs" in event:
                    part["logprobs"] += event["logprobs"]
            case [_, "done"]:
                assert item["content"][event["content_index"]]["text"] == event["text"]
            case other:
                assert other in (["created"], ["in_progress"])
    last = events[-1]["response"]
    assert last["output"] == output
    return dict(last)


def _anthropic(content: bytes) -> JsonDict:
    message: JsonDict = {}
    for event in sse(content):
        kind = event["type"]
        if kind == "message_start":
            message = event["message"]
        elif kind == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append({**event["content_block"], "json": ""})
        elif kind == "content_block_delta":
            assert event["index"] == len(message["content"]) - 1
            delta = dict(event["delta"])
            del delta["type"]
            _join(
                message["content"][-1],
                {{"partial_json": "json"}.get(k, k): v for k, v in delta.items()},
            )
        elif kind == "content_block_stop":
            block = message["content"][event["index"]]
            with suppress(ValueError):  # cut off by the limit, or no call's
                block["input"] = json.loads(block.pop("json"))
        elif kind == "message_delta":
            message |= event["delta"] | {"usage": event["usage"]}
        else:
            assert kind in ("ping", "message_stop")
    return message


def _ollama(content: bytes) -> JsonDict:
    *lines, last = [json.loads(line) for line in content.splitlines()]
    for line in (*lines, last):
        assert line["done"] is (line is last)
    whole = dict(last)
    for part in reversed(lines):
        for name in ("message", "response", "thinking", "logprobs"):
            if name in part:
                whole[name] = _added(part[name], whole.get(name))
    return whole


def _added(first: Any, second: Any) -> Any:
    if isinstance(first, dict):
        second = second or {}
        names = {**first, **second}
        return {
            name: first.get(name) if name == "role" else _added(first.get(name), second.get(name))
            for name in names
        }
    if first is None or second is None:
        return first if second is None else second
    return first + second


def _sglang(content: bytes) -> Any:
    last: dict[int, JsonDict] = {}
    for event in sse(content):
        index = event.pop("index", 0)
        assert event["text"].startswith(last.get(index, {"text": ""})["text"])
        last[index] = event
    return last[0] if len(last) == 1 else [last[index] for index in sorted(last)]


_ASSEMBLERS = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completions,
    "/v1/responses": _responses,
    "/v1/messages": _anthropic,
    "/api/chat": _ollama,
    "/api/generate": _ollama,
    "/generate": _sglang,
}
