"""Clients from npm, unchanged: OpenAI's own, and Vercel's ai with @ai-sdk/openai-compatible."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from support import node

pytest.importorskip("fastapi")

if TYPE_CHECKING:
    from support.serving import Live

pytestmark = pytest.mark.slow  # the first run installs them

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]

OPENAI = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const asked = { model: "demo", messages, max_tokens: 24 };
const models = await client.models.list();
const whole = await client.chat.completions.create(asked);
let streamed = "", usage = null;
const stream = await client.chat.completions.create(
  { ...asked, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const helped = await client.chat.completions.stream(asked).finalContent();
const text = await client.completions.create(
  { model: "demo", prompt: "The capital of France is", max_tokens: 4 });
const response = await client.responses.create(
  { model: "demo", input: messages[0].content, max_output_tokens: 24 });
const events = [];
for await (const event of await client.responses.create(
  { model: "demo", input: messages[0].content, max_output_tokens: 24, stream: true })) {
  events.push(event.type);
}
const vector = (await client.embeddings.create({ model: "demo", input: "Hi" })).data[0].embedding;
const errors = [];
for (const wrong of [{ model: "none" }, { temperature: -1 }]) {
  try { await client.chat.completions.create({ ...asked, ...wrong }); }
  catch (error) { errors.push([error.constructor.name, error.status, error.param]); }
}
console.log(JSON.stringify({
  models: models.data.map((one) => one.id), whole: whole.choices[0].message.content, streamed,
  usage, helped, text: text.choices[0].text, response: response.output_text, events,
  width: vector.length, errors,
}));
"""

AI = """
import { generateText, streamText } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
const provider = createOpenAICompatible({
  name: "local", baseURL: process.argv[2] + "/v1", includeUsage: true });
const asked = {
  model: provider("demo"), prompt: "What is the capital of France?", maxOutputTokens: 24,
  temperature: 0, maxRetries: 0 };
const whole = await generateText(asked);
const stream = streamText(asked);
let streamed = "";
for await (const piece of stream.textStream) streamed += piece;
const usage = await stream.usage;
console.log(JSON.stringify({
  whole: whole.text, streamed, reason: whole.finishReason, tokens: usage.outputTokens }));
"""


def test_openai_6_reads_every_answer(server: Live, demo, pytestconfig: pytest.Config):
    folder = node.installed(pytestconfig.cache, "openai@6")
    found = node.run(folder, OPENAI, server.url)
    expected = demo.generate(FRANCE, max_tokens=24)
    for name in ("whole", "streamed", "helped", "response"):
        assert found[name] == expected.text, name
    assert found["models"] == ["demo", "demo:pirate"]
    assert found["usage"]["completion_tokens"] == expected.stats.completion_tokens
    assert found["text"] == demo.generate("The capital of France is", max_tokens=4).text
    assert found["events"][0] == "response.created"
    assert found["events"][-1] == "response.completed"
    assert found["width"] == demo.config.hidden_size
    assert found["errors"] == [
        ["NotFoundError", 404, "model"],
        ["BadRequestError", 400, "temperature"],
    ]


def test_vercels_ai_reads_text_and_streams(server: Live, demo, pytestconfig: pytest.Config):
    folder = node.installed(pytestconfig.cache, "ai@6", "@ai-sdk/openai-compatible@2")
    found = node.run(folder, AI, server.url)
    expected = demo.generate(FRANCE, max_tokens=24)
    assert found == {
        "whole": expected.text,
        "streamed": expected.text,
        "reason": "stop",
        "tokens": expected.stats.completion_tokens,
    }
