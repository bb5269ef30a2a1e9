"""Ollama's API, asked by Ollama's own client."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

import minicpm_mlx as mm
from support import node
from support.leaving import leaves

ollama = pytest.importorskip("ollama")
pytest.importorskip("fastapi")

from minicpm_mlx.text.chat_template import Template  # noqa: E402

if TYPE_CHECKING:
    from support.serving import Live

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a story about a fox."}]
SHORT = {"num_predict": 6}


@pytest.fixture
def client(server: Live) -> Iterator[Any]:
    with ollama.Client(host=server.url) as client:
        yield client


def lines(server: Live, path: str, body: dict[str, Any]) -> list[Any]:
    answer = server.ask("POST", path, body)
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.body.splitlines()]


def test_models_are_listed_with_tags(client):
    found = client.list().models
    assert [one.model for one in found] == ["demo:latest", "demo:pirate"]
    assert len({one.digest for one in found}) == 2
    assert found[0].size > 1e8
    assert found[0].details.parameter_size == "134.52M"


def test_all_models_are_in_memory(client):
    found = client.ps().models
    assert [one.name for one in found] == ["demo:latest", "demo:pirate"]
    assert found[0].context_length == 8192


def test_a_model_is_shown(client, demo):
    shown = client.show("demo")
    assert shown.template == demo.tokenizer.template.source
    assert shown.license == "Apache-2.0"
    assert shown.capabilities == ["completion"]
    assert "temperature" in shown.parameters
    family = shown.modelinfo["general.architecture"]
    assert shown.modelinfo[f"{family}.context_length"] == 8192
    with pytest.raises(ollama.ResponseError, match="demo:pirate"):
        client.show("llama3")


def test_the_version_is_one_that_clients_compare(server):
    version = server.ask("GET", "/api/version").json["version"]
    assert tuple(map(int, version.split("."))) >= (0, 12, 11)


def test_a_greedy_reply_is_what_generate_says(client, demo):
    answer = client.chat("demo", FRANCE, tools=[])
    expected = demo.generate(FRANCE)
    assert answer.message.content == expected.text
    assert (answer.done, answer.done_reason) == (True, "stop")
    assert answer.prompt_eval_count == expected.stats.prompt_tokens
    assert answer.eval_count == expected.stats.completion_tokens
    assert answer.total_duration >= answer.eval_duration > 0


def test_a_chat_is_streamed_unless_it_is_said_otherwise(server, demo):
    found = lines(server, "/api/chat", {"model": "demo", "messages": STORY, "options": SHORT})
    assert len(found) > 4
    assert [line["done"] for line in found] == [False] * (len(found) - 1) + [True]
    text = "".join(line["message"]["content"] for line in found)
    assert text == demo.generate(STORY, max_tokens=6).text
    assert found[-1]["done_reason"] == "length"


def test_the_client_streams_chats_and_texts(client, demo):
    chat = list(client.chat("demo:latest", STORY, stream=True, options=SHORT))
    assert "".join(part.message.content for part in chat) == demo.generate(STORY, max_tokens=6).text
    text = list(client.generate("demo", "Once upon a time", raw=True, stream=True, options=SHORT))
    expected = demo.generate("Once upon a time", max_tokens=6)
    assert "".join(part.response for part in text) == expected.text
    assert text[-1].eval_count == 6


def test_generate_goes_through_the_template_unless_it_is_raw(client, demo):
    system = {"role": "system", "content": "You are a pirate."}
    asked = client.generate("demo", STORY[0]["content"], system=system["content"], options=SHORT)
    assert asked.response == demo.generate([system, *STORY], max_tokens=6).text
    raw = client.generate("demo", "The capital of France is", raw=True, options=SHORT)
    assert raw.response == demo.generate("The capital of France is", max_tokens=6).text
    assert raw.context is None


def test_context_carries_the_conversation_on(client, demo):
    first = client.generate("demo", FRANCE[0]["content"])
    said = {"role": "assistant", "content": first.response}
    more = {"role": "user", "content": "And of Spain?"}
    second = client.generate("demo", more["content"], context=first.context, options=SHORT)
    assert second.prompt_eval_count == len(demo.encode([*FRANCE, said, more]))
    assert second.response == demo.generate([*FRANCE, said, more], max_tokens=6).text


def test_nothing_to_say_loads_the_model(client, server):
    assert client.generate("demo").done_reason == "load"
    answer = client.chat("demo", [])
    assert (answer.done, answer.done_reason, answer.message.content) == (True, "load", "")
    for path in ("/api/generate", "/api/chat"):
        assert server.ask("POST", path, {"model": "demo"}).json["done_reason"] == "load"


def test_options_are_the_samplings(client, demo):
    def said(**options: Any) -> str:
        answer = client.chat("demo", STORY, options={**SHORT, **options})
        return answer.message.content

    how = mm.Sampling(temperature=1.5, top_p=0.9, top_k=50, seed=7, repetition_penalty=1.2)
    expected = demo.generate(STORY, max_tokens=6, sampling=how).text
    given = {"temperature": 1.5, "top_p": 0.9, "top_k": 50, "seed": 7, "repeat_penalty": 1.2}
    assert said(**given) == expected
    plain = mm.Sampling(temperature=0.0)
    assert (
        said(repeat_penalty=3.0, repeat_last_n=0)
        == demo.generate(STORY, max_tokens=6, sampling=plain).text
    )


def test_machine_options_change_nothing(client, demo):
    machine = {"num_gpu": 1, "num_thread": 4, "num_batch": 8, "num_keep": 4, "use_mmap": True}
    off = {"mirostat": 0, "tfs_z": 1.0, "typical_p": 1.0, "repeat_last_n": -1, "num_ctx": 8192}
    answer = client.chat("demo", STORY, options={**SHORT, **machine, **off}, keep_alive="5m")
    assert answer.message.content == demo.generate(STORY, max_tokens=6).text


@pytest.mark.parametrize("limit", [-1, -2, 0])
def test_a_reply_without_limit_goes_on_to_its_end(client, demo, limit):
    answer = client.chat("demo", FRANCE, options={"num_predict": limit})
    assert answer.message.content == demo.generate(FRANCE, max_tokens=None).text


def test_num_ctx_holds_prompt_and_reply(client, demo):
    prompt = len(demo.encode(STORY))
    answer = client.chat("demo", STORY, options={"num_ctx": prompt + 3})
    assert (answer.eval_count, answer.done_reason) == (3, "length")
    with pytest.raises(ollama.ResponseError, match="num_ctx"):
        client.chat("demo", STORY, options={"num_ctx": prompt})


def test_a_stop_string_ends_the_reply(client, demo):
    whole = demo.generate(STORY, max_tokens=20).text
    stop = whole.split()[4]
    answer = client.chat("demo", STORY, options={"num_predict": 20, "stop": [stop]})
    assert answer.message.content == whole[: whole.index(stop)]
    assert answer.done_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_come_with_their_tokens(client, demo, stream):
    asked = {"logprobs": True, "top_logprobs": 2, "options": {"num_predict": 3}}
    answer = client.chat("demo", STORY, stream=stream, **asked)
    parts = list(answer) if stream else [answer]
    found = [one for part in parts for one in part.logprobs or []]
    text = "".join(part.message.content for part in parts)
    assert "".join(one.token for one in found) == text
    for one in found:
        best = [other.logprob for other in one.top_logprobs]
        assert len(best) == 2
        assert best == sorted(best, reverse=True)
        assert one.logprob <= best[0] <= 0


def test_json_and_schemas_are_followed(client):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    answer = client.chat("demo", FRANCE, format=schema, options={"num_predict": 24})
    assert json.loads(answer.message.content) == {"city": "Paris"}
    answer = client.chat("demo", FRANCE, format="json", options={"num_predict": 4})
    assert answer.message.content.startswith("{")


def test_embeddings_have_length_one_but_in_the_older_form(client, server):
    found = client.embed("demo", ["A fox.", "The capital of France is Paris."])
    assert len(found.embeddings) == 2
    assert found.prompt_eval_count > 8
    for vector in found.embeddings:
        assert math.isclose(sum(value * value for value in vector), 1, rel_tol=1e-5)
    (alone,) = client.embed("demo", "A fox.").embeddings
    assert all(map(lambda a, b: abs(a - b) < 1e-3, alone, found.embeddings[0]))
    older = client.embeddings("demo", "A fox.").embedding
    length = math.sqrt(sum(value * value for value in older))
    assert length > 2
    assert all(abs(a / length - b) < 1e-3 for a, b in zip(older, alone, strict=True))


def test_a_text_too_long_to_embed_is_cut_or_refused(demo, serving):
    with serving() as server:
        server.service.context_length = 8
        with ollama.Client(host=server.url) as client:
            assert client.embed("demo", "word " * 30).prompt_eval_count == 8
            with pytest.raises(ollama.ResponseError, match="context"):
                client.embed("demo", "word " * 30, truncate=False)


def test_nothing_to_embed_is_an_empty_answer(client):
    assert client.embed("demo", "").embeddings == []
    assert client.embeddings("demo", "").embedding == []


def test_the_async_client_chats_several_at_once(server, demo):
    async def one(question: str) -> str:
        stream = await client.chat(
            "demo", [{"role": "user", "content": question}], stream=True, options=SHORT
        )
        return "".join([part.message.content async for part in stream])

    async def all_of_them() -> list[str]:
        async with client:
            return await asyncio.gather(*(one(question) for question in questions))

    client = ollama.AsyncClient(host=server.url)
    questions = ["What is 1 + 1?", "Name a color.", "Who wrote Hamlet?"]
    expected = [
        demo.generate([{"role": "user", "content": question}], max_tokens=6).text
        for question in questions
    ]
    assert asyncio.run(all_of_them()) == expected


def test_an_adapter_answers_to_its_name(client, demo):
    pirate = client.chat("demo:pirate", STORY, options=SHORT).message.content
    assert pirate != demo.generate(STORY, max_tokens=6).text


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.pull("llama3"),
        lambda client: client.push("demo"),
        lambda client: client.create("mine", from_="demo"),
        lambda client: client.copy("demo", "mine"),
        lambda client: client.delete("demo"),
    ],
)
def test_models_are_not_changed(client, ask):
    with pytest.raises(ollama.ResponseError, match="changes no models") as refused:
        ask(client)
    assert refused.value.status_code == 403


def function(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("field", "path", "more"),
    [
        ("template", "generate", {"template": "{{ .Prompt }}"}),
        ("suffix", "generate", {"suffix": "the end"}),
        ("images", "generate", {"images": ["aGk="]}),
        ("width", "generate", {"width": 512}),
        ("system", "generate", {"raw": True, "system": "You are a pirate."}),
        ("context", "generate", {"raw": True, "context": [1, 2]}),
        ("token ids", "generate", {"context": [10**6]}),
        ("messages[0].images", "chat", {"messages": [{**STORY[0], "images": ["aGk="]}]}),
        ("role", "chat", {"messages": [{"role": "owner", "content": "hi"}]}),
        ("tools", "chat", {"tools": [function("look")]}),
        ("think", "chat", {"think": True}),
        ("think", "chat", {"think": "high"}),
        ("format", "chat", {"format": "yaml"}),
        ("top_logprobs", "chat", {"top_logprobs": 3}),
        ("options.mirostat", "chat", {"options": {"mirostat": 2}}),
        ("options.tfs_z", "chat", {"options": {"tfs_z": 0.5}}),
        ("options.typical_p", "chat", {"options": {"typical_p": 0.5}}),
        ("options.num_ctx", "chat", {"options": {"num_ctx": 10**6}}),
        ("options.repeat_last_n", "chat", {"options": {"repeat_last_n": 64}}),
        ("options.penalize_newline", "chat", {"options": {"penalize_newline": False}}),
        ("options.wisdom", "chat", {"options": {"wisdom": 1}}),
        ("top_p", "chat", {"options": {"top_p": 2.0}}),
        ("dimensions", "embed", {"input": "a", "dimensions": 8}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(server, field, path, more):
    given = {"generate": {"prompt": "Hi"}, "chat": {"messages": STORY}, "embed": {}}[path]
    answer = server.ask("POST", f"/api/{path}", {"model": "demo", **given, **more})
    assert answer.status == 400
    assert answer.json.keys() == {"error"}
    assert field in answer.json["error"]


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(ollama.ResponseError) as refused:
        client.chat("llama3", STORY)
    assert refused.value.status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_not_answered_on(server, stream):
    body = {"model": "demo", "prompt": "Once upon a time", "raw": True, "stream": stream}
    leaves(server, "/api/generate", body)


# Tools need a template that has a place for them; the demo's own has none. This one makes a model
# repeat what the user says.

TOOLS = """{{ tools | length }} <tool_call>
{% for time in range(4) %}{{ messages[0].content }}
{% endfor %}"""

CALL = '<tool_call>{"name": "look", "arguments": {"at": "sea"}}</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_functions_are_told_apart_from_text(demo, demo_folder, stream):
    from support.serving import serving as serve

    tokenizer = mm.load_tokenizer(demo_folder)
    tokenizer.template = Template(TOOLS)
    with (
        serve(replace(demo, tokenizer=tokenizer)) as live,
        ollama.Client(host=live.url) as client,
    ):
        assert client.show("demo").capabilities == ["completion", "tools"]
        answer = client.chat(
            "demo",
            [{"role": "user", "content": f"Sure! {CALL}"}],
            tools=[function("look")],
            options={"num_predict": 50, "repeat_penalty": 1.0},
            stream=stream,
        )
        parts = list(answer) if stream else [answer]
        calls = [call for part in parts for call in part.message.tool_calls or []]
        assert calls[0].function.name == "look"
        assert calls[0].function.arguments == {"at": "sea"}
        text = "".join(part.message.content for part in parts)
        assert text.startswith("Sure!")
        assert "tool_call" not in text[:8]


NPM = """
import { Ollama } from "ollama";
const client = new Ollama({ host: process.argv[2] });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const asked = { model: "demo", messages, options: { num_predict: 24 } };
const whole = await client.chat(asked);
let streamed = "", reason = null;
for await (const part of await client.chat({ ...asked, stream: true })) {
  streamed += part.message.content;
  reason = part.done_reason ?? reason;
}
const text = await client.generate(
  { model: "demo", prompt: "The capital of France is", raw: true, options: { num_predict: 4 } });
const vectors = await client.embed({ model: "demo", input: ["Hi", "Ho"] });
const errors = [];
try { await client.chat({ ...asked, model: "none" }); }
catch (error) { errors.push(error.status_code); }
console.log(JSON.stringify({
  models: (await client.list()).models.map((one) => one.name),
  family: (await client.show({ model: "demo" })).details.families,
  running: (await client.ps()).models.length,
  version: (await client.version()).version,
  whole: whole.message.content, streamed, reason, text: text.response,
  widths: vectors.embeddings.map((one) => one.length), errors,
}));
"""


@pytest.mark.slow
def test_the_client_from_npm_reads_every_answer(server, demo, pytestconfig: pytest.Config):
    folder = node.installed(pytestconfig.cache, "ollama@0.6")
    found = node.run(folder, NPM, server.url)
    expected = demo.generate(FRANCE, max_tokens=24)
    assert found["whole"] == found["streamed"] == expected.text
    assert found["reason"] == expected.finish_reason
    assert found["text"] == demo.generate("The capital of France is", max_tokens=4).text
    assert found["models"] == ["demo:latest", "demo:pirate"]
    assert found["running"] == 2
    assert found["family"]
    assert found["version"]
    assert found["widths"] == [demo.config.hidden_size] * 2
    assert found["errors"] == [404]
