"""Drivers of the server's APIs: each writes requests and reads answers in its API's own form."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar

TOOL_TEMPLATE = """{%- if tools %}<|im_start|>system
You may call functions, described here:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Write a call as <tool_call>
{"name": ..., "arguments": {...}}
</tool_call><|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""A chat template that takes tools, whose calls are JSON as in Hermes and many models since."""

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Answer:
    """What an API says about one request; lists have one entry per choice."""

    texts: list[str]
    finish_reasons: list[str]
    """In the words of OpenAI's chat API."""
    prompt_tokens: int
    completion_tokens: int
    """Of all choices together."""
    model: str | None = None
    logprobs: list[float] = field(default_factory=list)
    """Of the first choice's tokens."""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    """Names and arguments of the functions that the first choice calls."""


def sse(content: bytes) -> list[Any]:
    """The data of server-sent events, without OpenAI's closing [DONE]."""
    lines = [line for line in content.decode().split("\n") if line.startswith("data: ")]
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


def same(*names: str) -> dict[str, str]:
    """Options whose fields have their names."""
    return dict(zip(names, names, strict=True))


class Driver:
    """One API. `names` maps each option that it offers to its field; "a.b" is a nested one."""

    path: str
    names: ClassVar[Mapping[str, str]]
    extras: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Fields that go along with an option, unless it is False."""
    error_keys: ClassVar[Set[str]] = {"message", "type", "param", "code"}

    def __init__(self, chat_text: Callable[[Messages], str]):
        self.chat_text = chat_text
        """Renders messages for APIs that take plain text."""

    def body(self, messages: Messages, **options: Any) -> dict[str, Any]:
        """A request that asks for the whole answer unless `stream` says otherwise."""
        body = self.prompt(messages) | {"model": "tiny"}
        for name, value in options.items():
            extras = {} if value is False else self.extras.get(name, {})
            for path, content in {self.names[name]: self.value(name, value), **extras}.items():
                *parents, last = path.split(".")
                place = body
                for parent in parents:
                    place = place.setdefault(parent, {})
                place[last] = content
        return body

    def value(self, name: str, value: Any) -> Any:
        """An option's value in the API's own form."""
        return [self.tool(function) for function in value] if name == "tools" else value

    def tool(self, function: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "function", "function": function}

    def prompt(self, messages: Messages) -> dict[str, Any]:
        return {"messages": list(messages)}

    def read(self, answer: Any) -> Answer:
        raise NotImplementedError

    def join(self, content: bytes) -> Any:
        """Puts a stream together into the answer that is not streamed."""
        raise NotImplementedError

    def error(self, answer: Any) -> str:
        """The message of an error, whose form is checked."""
        assert answer.keys() == {"error"}
        assert answer["error"].keys() == self.error_keys
        return str(answer["error"]["message"])


class OpenAIChat(Driver):
    path = "/v1/chat/completions"
    names: ClassVar[Mapping[str, str]] = same(
        "model", "max_tokens", "temperature", "seed", "stop", "n", "stream", "tools"
    ) | {
        "logprobs": "top_logprobs",
        "schema": "response_format.json_schema.schema",
        "tool": "tool_choice.function.name",
    }
    extras: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "logprobs": {"logprobs": True},
        "schema": {
            "response_format.type": "json_schema",
            "response_format.json_schema.name": "x",
        },
        "tool": {"tool_choice.type": "function"},
        "stream": {"stream_options": {"include_usage": True}},
    }

    def read(self, answer: Any) -> Answer:
        choices, usage = answer["choices"], answer["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        return Answer(
            [self.text(choice) for choice in choices],
            [choice["finish_reason"] for choice in choices],
            usage["prompt_tokens"],
            usage["completion_tokens"],
            answer["model"],
            self.logprobs(choices[0]["logprobs"] or {}),
            self.calls(choices[0]),
        )

    def text(self, choice: Any) -> Any:
        return choice["message"]["content"]

    def logprobs(self, logprobs: Any) -> list[float]:
        return [entry["logprob"] for entry in logprobs.get("content", ())]

    def calls(self, choice: Any) -> list[tuple[str, Any]]:
        calls = [call["function"] for call in choice["message"].get("tool_calls") or ()]
        return [(call["name"], json.loads(call["arguments"])) for call in calls]

    def join(self, content: bytes) -> Any:
        *chunks, last = sse(content)
        assert {chunk["id"] for chunk in chunks} == {last["id"]}
        assert last["choices"] == []
        choices: dict[int, dict[str, Any]] = {}
        for chunk in chunks:
            (part,) = chunk["choices"]
            delta, logprobs = part["delta"], part["logprobs"] or {"content": []}
            empty = {"message": {"content": "", "tool_calls": []}, "logprobs": {"content": []}}
            choice = choices.setdefault(part["index"], empty)
            message = choice["message"]
            message["content"] += delta.get("content") or ""
            choice["logprobs"]["content"] += logprobs["content"]
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    message["tool_calls"].append(call)
                else:
                    begun = message["tool_calls"][call["index"]]["function"]
                    begun["arguments"] += call["function"]["arguments"]
            choice["finish_reason"] = part["finish_reason"]
        for choice in choices.values():
            if choice["message"]["tool_calls"] and not choice["message"]["content"]:
                choice["message"]["content"] = None
        return last | {"choices": [choices[index] for index in sorted(choices)]}


class OpenAICompletions(OpenAIChat):
    path = "/v1/completions"
    names: ClassVar[Mapping[str, str]] = {
        name: field for name, field in OpenAIChat.names.items() if name not in ("tools", "tool")
    } | {"schema": "guided_json", "logprobs": "logprobs"}
    extras: ClassVar[Mapping[str, Mapping[str, Any]]] = {"stream": OpenAIChat.extras["stream"]}

    def prompt(self, messages: Messages) -> dict[str, Any]:
        return {"prompt": self.chat_text(messages)}

    def text(self, choice: Any) -> Any:
        return choice["text"]

    def logprobs(self, logprobs: Any) -> list[float]:
        return list(logprobs.get("token_logprobs", ()))

    def calls(self, choice: Any) -> list[tuple[str, Any]]:
        return []

    def join(self, content: bytes) -> Any:
        *chunks, last = sse(content)
        choices: dict[int, dict[str, Any]] = {}
        for chunk in chunks:
            (part,) = chunk["choices"]
            empty = {"text": "", "logprobs": {"token_logprobs": []}}
            choice = choices.setdefault(part["index"], empty)
            choice["text"] += part["text"]
            choice["finish_reason"] = part["finish_reason"]
            choice["logprobs"]["token_logprobs"] += self.logprobs(part["logprobs"] or {})
        return last | {"choices": [choices[index] for index in sorted(choices)]}


class Responses(Driver):
    path = "/v1/responses"
    names: ClassVar[Mapping[str, str]] = same("model", "stream", "temperature", "tools") | {
        "max_tokens": "max_output_tokens",
        "logprobs": "top_logprobs",
        "schema": "text.format.schema",
        "tool": "tool_choice.name",
    }
    extras: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "logprobs": {"include": ["message.output_text.logprobs"]},
        "schema": {"text.format.type": "json_schema", "text.format.name": "x"},
        "tool": {"tool_choice.type": "function"},
    }

    def prompt(self, messages: Messages) -> dict[str, Any]:
        if messages[0]["role"] == "system":
            return {"instructions": messages[0]["content"], "input": list(messages[1:])}
        return {"input": list(messages)}

    def tool(self, function: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "function", **function}

    def read(self, answer: Any) -> Answer:
        messages = [item for item in answer["output"] if item["type"] == "message"]
        calls = [item for item in answer["output"] if item["type"] == "function_call"]
        reason = "length" if answer["status"] == "incomplete" else "stop"
        parts = [part for message in messages for part in message["content"]]
        return Answer(
            ["".join(part["text"] for part in parts)],
            ["tool_calls" if calls else reason],
            answer["usage"]["input_tokens"],
            answer["usage"]["output_tokens"],
            answer["model"],
            [entry["logprob"] for part in parts for entry in part.get("logprobs", ())],
            [(call["name"], json.loads(call["arguments"])) for call in calls],
        )

    def join(self, content: bytes) -> Any:
        events = sse(content)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        answer = events[-1]["response"]
        deltas = [event["delta"] for event in events if event["type"].endswith("text.delta")]
        assert "".join(deltas) == self.read(answer).texts[0]
        return answer


class Anthropic(Driver):
    path = "/v1/messages"
    names: ClassVar[Mapping[str, str]] = same(
        "model", "stream", "max_tokens", "temperature", "tools"
    ) | {
        "stop": "stop_sequences",
        "schema": "output_config.format.schema",
        "tool": "tool_choice.name",
    }
    extras: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "schema": {"output_config.format.type": "json_schema"},
        "tool": {"tool_choice.type": "tool"},
    }
    reasons: ClassVar[Mapping[str, str]] = {
        **{"end_turn": "stop", "stop_sequence": "stop"},
        **{"max_tokens": "length", "tool_use": "tool_calls"},
    }

    def prompt(self, messages: Messages) -> dict[str, Any]:
        body: dict[str, Any] = {"max_tokens": 4000}
        if messages[0]["role"] == "system":
            body["system"], messages = messages[0]["content"], messages[1:]
        return body | {"messages": list(messages)}

    def tool(self, function: Mapping[str, Any]) -> dict[str, Any]:
        return {"name": function["name"], "input_schema": function["parameters"]}

    def read(self, answer: Any) -> Answer:
        content, usage = answer["content"], answer["usage"]
        calls = [block for block in content if block["type"] == "tool_use"]
        return Answer(
            ["".join(block["text"] for block in content if block["type"] == "text")],
            [self.reasons[answer["stop_reason"]]],
            usage["input_tokens"] + usage["cache_read_input_tokens"],
            usage["output_tokens"],
            answer["model"],
            calls=[(block["name"], block["input"]) for block in calls],
        )

    def join(self, content: bytes) -> Any:
        answer: dict[str, Any] = {}
        arguments = ""
        for event in sse(content):
            kind = event["type"]
            if kind == "message_start":
                answer = event["message"]
            elif kind == "content_block_start":
                answer["content"].append(event["content_block"])
            elif kind == "content_block_delta" and event["delta"]["type"] == "text_delta":
                answer["content"][event["index"]]["text"] += event["delta"]["text"]
            elif kind == "content_block_delta":
                arguments += event["delta"]["partial_json"]
            elif kind == "content_block_stop" and arguments:
                answer["content"][event["index"]]["input"] = json.loads(arguments)
                arguments = ""
            elif kind == "message_delta":
                answer |= event["delta"] | {"usage": event["usage"]}
        return answer

    def error(self, answer: Any) -> str:
        assert answer.keys() == {"type", "error", "request_id"}
        assert answer["error"].keys() == {"type", "message"}
        return str(answer["error"]["message"])


class OllamaChat(Driver):
    path = "/api/chat"
    names: ClassVar[Mapping[str, str]] = same("model", "stream", "tools") | {
        **{name: f"options.{name}" for name in ("temperature", "seed", "stop")},
        "max_tokens": "options.num_predict",
        "logprobs": "top_logprobs",
        "schema": "format",
    }
    extras: ClassVar[Mapping[str, Mapping[str, Any]]] = {"logprobs": {"logprobs": True}}

    def body(self, messages: Messages, **options: Any) -> dict[str, Any]:
        return super().body(messages, **{"stream": False} | options)

    def read(self, answer: Any) -> Answer:
        calls = [call["function"] for call in answer.get("message", {}).get("tool_calls", ())]
        return Answer(
            [answer["message"]["content"] if "message" in answer else answer["response"]],
            [answer["done_reason"]],
            answer["prompt_eval_count"],
            answer["eval_count"],
            answer["model"],
            [entry["logprob"] for entry in answer.get("logprobs", ())],
            [(call["name"], call["arguments"]) for call in calls],
        )

    def join(self, content: bytes) -> Any:
        *lines, last = [json.loads(line) for line in content.splitlines()]
        assert [line["done"] for line in lines] == [False] * len(lines)
        parts = [*lines, last]
        if "message" in last:
            last["message"]["tool_calls"] = [
                call for part in parts for call in part["message"].get("tool_calls", ())
            ]
            last["message"]["content"] = "".join(part["message"]["content"] for part in parts)
        else:
            last["response"] = "".join(part["response"] for part in parts)
        return last | {"logprobs": [entry for part in parts for entry in part.get("logprobs", ())]}

    def error(self, answer: Any) -> str:
        assert answer.keys() == {"error"}
        return str(answer["error"])


class OllamaGenerate(OllamaChat):
    path = "/api/generate"
    names: ClassVar[Mapping[str, str]] = {
        name: path for name, path in OllamaChat.names.items() if name != "tools"
    }

    def prompt(self, messages: Messages) -> dict[str, Any]:
        if [message["role"] for message in messages] in (["user"], ["system", "user"]):
            return {
                "prompt": messages[-1]["content"],
                "system": messages[0]["content"] if len(messages) > 1 else None,
            }
        return {"prompt": self.chat_text(messages), "raw": True}


class SGLang(Driver):
    path = "/generate"
    names: ClassVar[Mapping[str, str]] = same("stream") | {
        **{name: f"sampling_params.{name}" for name in ("temperature", "stop", "n")},
        "model": "lora_path",
        "max_tokens": "sampling_params.max_new_tokens",
        "seed": "sampling_params.sampling_seed",
        "logprobs": "top_logprobs_num",
        "schema": "sampling_params.json_schema",
    }
    extras: ClassVar[Mapping[str, Mapping[str, Any]]] = {"logprobs": {"return_logprob": True}}
    error_keys: ClassVar[Set[str]] = {"message"}

    def prompt(self, messages: Messages) -> dict[str, Any]:
        return {"text": self.chat_text(messages)}

    def body(self, messages: Messages, **options: Any) -> dict[str, Any]:
        body = super().body(messages, **options)
        del body["model"]
        return body

    def value(self, name: str, value: Any) -> Any:
        if name == "model":
            return None if value == "tiny" else value.partition(":")[2] or value
        return json.dumps(value) if name == "schema" else value

    def read(self, answer: Any) -> Answer:
        choices = answer if isinstance(answer, list) else [answer]
        metas = [choice["meta_info"] for choice in choices]
        logprobs = metas[0].get("output_token_logprobs", ())
        return Answer(
            [choice["text"] for choice in choices],
            [meta["finish_reason"]["type"] for meta in metas],
            metas[0]["prompt_tokens"],
            sum(meta["completion_tokens"] for meta in metas),
            logprobs=[entry[0] for entry in logprobs],
        )

    def join(self, content: bytes) -> Any:
        last: dict[int, Any] = {}
        for event in sse(content):
            index = event.get("index", 0)
            assert event["text"].startswith(last.get(index, {"text": ""})["text"])
            last[index] = event
        return [last[index] for index in sorted(last)]


_APIS = (OpenAIChat, OpenAICompletions, Responses, Anthropic, OllamaChat, OllamaGenerate, SGLang)

DRIVERS: Mapping[str, type[Driver]] = {api.path: api for api in _APIS}

_MESSAGES = [{"role": "user", "content": "Hi"}]

SMALL: Mapping[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": _MESSAGES, "max_tokens": 2},
    "/v1/completions": {"model": "tiny", "prompt": "Hi", "max_tokens": 2},
    "/v1/responses": {"model": "tiny", "input": "Hi", "max_output_tokens": 2},
    "/v1/embeddings": {"model": "tiny", "input": "Hi"},
    "/v1/messages": {"model": "tiny", "messages": _MESSAGES, "max_tokens": 2},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": _MESSAGES},
    "/api/chat": {"model": "tiny", "messages": _MESSAGES, "options": {"num_predict": 2}},
    "/api/generate": {"model": "tiny", "prompt": "Hi", "options": {"num_predict": 2}},
    "/api/embed": {"model": "tiny", "input": "Hi"},
    "/api/show": {"model": "tiny"},
    "/generate": {"text": "Hi", "sampling_params": {"max_new_tokens": 2}},
}
"""A small request for each route that takes one."""


def merged(body: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`body` with fields replaced; objects are merged."""
    found = dict(body)
    for name, value in more.items():
        inner = found.get(name)
        nested = isinstance(inner, dict) and isinstance(value, dict)
        found[name] = merged(inner, value) if nested else value
    return found
