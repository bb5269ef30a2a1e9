// The AI SDK with the provider for each API: compatible, openai (responses), anthropic.
import { readFileSync } from "node:fs";
import { generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";
import { description, json, lookUp, parameters, person, report, sky, url, weather }
  from "./report.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false; // on standard output
const kind = process.argv[3];
const baseURL = `${url}/v1`;
const providers = {
  compatible: async () => (await import("@ai-sdk/openai-compatible")).createOpenAICompatible(
    { name: "local", baseURL, includeUsage: true, supportsStructuredOutputs: true }),
  openai: async () => (await import("@ai-sdk/openai")).createOpenAI({ baseURL, apiKey: "none" }),
  anthropic: async () => (await import("@ai-sdk/anthropic")).createAnthropic(
    { baseURL, apiKey: "none" }),
};
const options = {
  openai: { openai: { reasoningSummary: "auto", forceReasoning: true, store: false } },
  anthropic: { anthropic: { thinking: { type: "enabled", budgetTokens: 1024 } } },
};
const manifest = new URL("./node_modules/ai/package.json", import.meta.url);
const { version } = JSON.parse(readFileSync(manifest));
const base = {
  model: (await providers[kind]())("scripted"), maxRetries: 0, providerOptions: options[kind],
  maxOutputTokens: 4000 };
const withTools = (cities) => ({
  ...base, prompt: weather, stopWhen: stepCountIs(5),
  tools: {
    get_weather: tool({
      description, inputSchema: jsonSchema(parameters), execute: lookUp(cities) }),
  },
});
const fail = ({ error }) => { throw error; };

await report(version, {
  thinking: async () => {
    const reply = await generateText({ ...base, prompt: sky });
    return [reply.reasoningText ?? "", reply.text];
  },
  "thinking streamed": async () => {
    let [thought, answer] = ["", ""];
    for await (const part of streamText({ ...base, prompt: sky, onError: fail }).fullStream) {
      if (part.type === "reasoning-delta") thought += part.text;
      if (part.type === "text-delta") answer += part.text;
    }
    return [thought, answer];
  },
  tools: async () => {
    const cities = [];
    const { text } = await generateText(withTools(cities));
    return [...cities, text];
  },
  "tools streamed": async () => {
    const cities = [];
    const text = await streamText({ ...withTools(cities), onError: fail }).text;
    return [...cities, text];
  },
  structure: async () => {
    const output = Output.object({ schema: jsonSchema(person) });
    return (await generateText({ ...base, prompt: json, output })).output;
  },
  "structure with tools": async () => {
    const output = Output.object({ schema: jsonSchema(person) });
    return (await generateText({ ...withTools([]), prompt: json, output })).output;
  },
});
