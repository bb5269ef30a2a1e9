"""What is peculiar to Ollama's API; Ollama's own clients read it."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

import minicpm_mlx as mm
from support import node

pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a story about a fox."}]
SHORT = {"num_predict": 6}


@pytest.fixture
def client(tiny_server: Live) -> Iterator[Any]:
    ollama = pytest.importorskip("ollama")
    with ollama.Client(host=tiny_server.url) as client:
        yield client


def test_models_are_listed_shown_and_in_memory(client, tiny):
    import ollama

    found = client.list().models
    assert [model.model for model in found] == ["tiny:latest", "tiny:other"]
    assert len({model.digest for model in found}) == 2
    assert found[0].size > 1e6
    assert found[0].details.parameter_size == "0.48M"
    running = client.ps().models
    assert [model.name for model in running] == ["tiny:latest", "tiny:other"]
    assert running[0].context_length == 4096
    shown = client.show("tiny")
    assert shown.template == tiny.tokenizer.template.source
    assert shown.capabilities == ["completion", "tools"]
    assert "temperature" in shown.parameters
    family = shown.modelinfo["general.architecture"]
    assert shown.modelinfo[f"{family}.context_length"] == 4096
    with pytest.raises(ollama.ResponseError, match="tiny:other"):
        client.show("llama3")


def test_a_model_without_tools_and_with_a_licence_is_shown(server):
    shown = server.ask("POST", "/api/show", {"model": "demo"}).json
    assert shown["license"] == "Apache-2.0"
    assert shown["capabilities"] == ["completion"]


def test_the_version_is_one_that_clients_compare(tiny_server):
    version = tiny_server.ask("GET", "/api/version").json["version"]
    assert tuple(map(int, version.split("."))) >= (0, 12, 11)


def test_the_clients_read_chats_and_texts(client, tiny, tiny_server):
    import ollama

    async def ask() -> str:
        async with ollama.AsyncClient(host=tiny_server.url) as there:
            stream = await there.chat("tiny", STORY, stream=True, options=SHORT)
            return "".join([part.message.content async for part in stream])

    whole = client.chat("tiny:latest", STORY, tools=[], options=SHORT)
    chat = [*client.chat("tiny", STORY, stream=True, options=SHORT)]
    expected = tiny.generate(STORY, max_tokens=6).text
    assert whole.message.content == "".join(part.message.content for part in chat) == expected
    assert asyncio.run(ask()) == expected
    assert whole.total_duration >= whole.eval_duration > 0
    text = [*client.generate("tiny", "Once upon", raw=True, stream=True, options=SHORT)]
    expected = tiny.generate("Once upon", max_tokens=6).text
    assert "".join(part.response for part in text) == expected
    with pytest.raises(ollama.ResponseError) as refused:
        client.chat("llama3", STORY)
    assert refused.value.status_code == 404


def test_a_chat_is_streamed_unless_it_is_said_otherwise(tiny_server):
    body = {"model": "tiny", "messages": STORY, "options": SHORT}
    answer = tiny_server.ask("POST", "/api/chat", body)
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert len(answer.body.splitlines()) > 4


def test_context_carries_the_conversation_on(client, tiny):
    first = client.generate("tiny", FRANCE[0]["content"], options=SHORT)
    assert client.generate("tiny", "A", raw=True, options=SHORT).context is None
    reply = tiny.generate(FRANCE, max_tokens=6)
    more = tiny.encode([{"role": "user", "content": "And of Spain?"}])
    second = client.generate("tiny", "And of Spain?", context=first.context, options=SHORT)
    assert first.context == [*tiny.encode(FRANCE), *reply.token_ids]
    assert second.prompt_eval_count > len(first.context) + len(more) - 2


def test_an_assistants_message_at_the_end_is_continued(client, tiny):
    begun = {"role": "assistant", "content": "The capital of Spain is "}
    expected = tiny.generate(tiny.tokenizer.chat_text(STORY) + begun["content"], max_tokens=6)
    whole = client.chat("tiny", [*STORY, begun], options=SHORT)
    parts = [*client.chat("tiny", [*STORY, begun], stream=True, options=SHORT)]
    assert whole.message.content == "".join(part.message.content for part in parts)
    assert whole.message.content == expected.text
    assert whole.prompt_eval_count == expected.stats.prompt_tokens
    plain = client.chat("tiny", STORY, options=SHORT).message.content
    empty = {"role": "assistant", "content": ""}
    assert client.chat("tiny", [*STORY, empty], options=SHORT).message.content == plain


def test_calls_at_the_end_are_a_turn_of_their_own(client, tiny):
    call = {"function": {"name": "look", "arguments": {}}}
    turns = [*STORY, {"role": "assistant", "content": "", "tool_calls": [call]}]
    expected = tiny.generate(turns, max_tokens=6).text
    assert client.chat("tiny", turns, options=SHORT).message.content == expected


def test_nothing_to_say_loads_the_model(client, tiny_server):
    assert client.generate("tiny").done_reason == "load"
    answer = client.chat("tiny", [])
    assert (answer.done, answer.done_reason, answer.message.content) == (True, "load", "")
    for path in ("/api/generate", "/api/chat"):
        assert tiny_server.ask("POST", path, {"model": "tiny"}).json["done_reason"] == "load"


def test_options_are_the_samplings(client, tiny):
    def said(**options: Any) -> str:
        return client.chat("tiny", STORY, options={**SHORT, **options}).message.content

    how = mm.Sampling(temperature=1.5, top_p=0.9, top_k=50, seed=7, repetition_penalty=1.2)
    expected = tiny.generate(STORY, max_tokens=6, sampling=how).text
    given = {"temperature": 1.5, "top_p": 0.9, "top_k": 50, "seed": 7, "repeat_penalty": 1.2}
    assert said(**given) == expected
    plain = tiny.generate(STORY, max_tokens=6).text
    assert said(repeat_penalty=3.0, repeat_last_n=0) == plain


def test_a_limit_of_none_and_num_ctx_are_kept(client, tiny):
    import ollama

    prompt = len(tiny.encode(STORY))
    for limit in (-1, -2, 0):
        answer = client.chat("tiny", STORY, options={"num_predict": limit, "num_ctx": prompt + 3})
        assert (answer.eval_count, answer.done_reason) == (3, "length")
    with pytest.raises(ollama.ResponseError, match="num_ctx"):
        client.chat("tiny", STORY, options={"num_ctx": prompt})


def test_log_probabilities_name_the_likeliest_others(client):
    answer = client.chat("tiny", STORY, logprobs=True, top_logprobs=2, options=SHORT)
    for entry in answer.logprobs:
        best = [other.logprob for other in entry.top_logprobs]
        assert len(best) == 2
        assert entry.logprob == best[0] >= best[1]


def test_format_may_be_json(client):
    pytest.importorskip("llguidance")
    answer = client.chat("tiny", FRANCE, format="json", options=SHORT)
    assert answer.message.content.startswith("{")


@pytest.mark.slow
def test_format_is_a_schema_that_names_all_fields(server):
    pytest.importorskip("llguidance")
    ollama = pytest.importorskip("ollama")
    import pydantic

    class Country(pydantic.BaseModel):  # of the client's own documentation
        name: str
        capital: str
        languages: list[str]

    asked = [{"role": "user", "content": "Tell me about Canada."}]
    schema = Country.model_json_schema()
    options = {"num_predict": 200, "temperature": 0}
    with ollama.Client(host=server.url) as client:
        chat = client.chat("demo", asked, format=schema, options=options).message.content
        text = client.generate("demo", asked[0]["content"], format=schema, options=options).response
    assert json.loads(chat).keys() == json.loads(text).keys() == {"name", "capital", "languages"}


def test_embeddings_have_length_one_but_in_the_older_form(client):
    texts = ["A fox.", "The capital of France is Paris."]
    found = client.embed("tiny", texts)
    assert found.prompt_eval_count >= len("".join(texts))
    for vector in found.embeddings:
        assert math.isclose(sum(value * value for value in vector), 1, rel_tol=1e-5)
    (alone,) = client.embed("tiny", texts[0]).embeddings
    assert alone == pytest.approx(found.embeddings[0], abs=1e-3)
    older = client.embeddings("tiny", texts[0]).embedding
    length = math.sqrt(sum(value * value for value in older))
    assert abs(length - 1) > 0.1
    assert [value / length for value in older] == pytest.approx(alone, abs=1e-3)
    assert client.embed("tiny", "").embeddings == []
    assert client.embeddings("tiny", "").embedding == []


def test_a_text_too_long_to_embed_is_cut_or_refused(client, tiny_server, monkeypatch):
    import ollama

    for num_ctx, count in ((6, 6), (10**6, 150)):
        found = client.embed("tiny", "word " * 30, options={"num_ctx": num_ctx})
        assert found.prompt_eval_count == count

    monkeypatch.setattr(tiny_server.service, "context_length", 8)
    assert client.embed("tiny", "word " * 30).prompt_eval_count == 8
    with pytest.raises(ollama.ResponseError, match="context"):
        client.embed("tiny", "word " * 30, truncate=False)
    with pytest.raises(ollama.ResponseError, match="dimensions"):
        client.embed("tiny", "a", dimensions=8)


def test_models_are_not_changed(client):
    import ollama

    for ask in (
        lambda: client.pull("llama3"),
        lambda: client.push("tiny"),
        lambda: client.create("mine", from_="tiny"),
        lambda: client.copy("tiny", "mine"),
        lambda: client.delete("tiny"),
    ):
        with pytest.raises(ollama.ResponseError, match="changes no models") as refused:
            ask()
        assert refused.value.status_code == 403


CALL = '<tool_call>{"name": "look", "arguments": {"at": "sea"}}</tool_call>'
PLACE = {"type": "object", "properties": {"at": {"type": "string"}}}
LOOK = {"type": "function", "function": {"name": "look", "parameters": PLACE}}


def test_calls_of_functions_are_told_apart_from_text(client, monkeypatch):
    pytest.importorskip("llguidance")
    from minicpm_mlx.lm.structured.grammar import grammar_of
    from minicpm_mlx.server.tool_calling import RequestTools

    async def forced(tools: RequestTools, *_: Any) -> Any:
        return grammar_of(tools.tokenizer, ebnf=f"start: {json.dumps(f'Sure! {CALL}')}")

    monkeypatch.setattr(RequestTools, "grammar", forced)
    for stream in (False, True):
        answer = client.chat("tiny", STORY, tools=[LOOK], stream=stream)
        parts = [*answer] if stream else [answer]
        (call,) = [call for part in parts for call in part.message.tool_calls or []]
        assert (call.function.name, call.function.arguments) == ("look", {"at": "sea"})
        assert "".join(part.message.content for part in parts) == "Sure! "


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
