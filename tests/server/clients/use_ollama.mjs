import { Ollama } from "ollama";
import { description, json, lookUp, parameters, person, report, sky, url, user, weather }
  from "./report.mjs";

const { readFileSync } = await import("node:fs");
const manifest = new URL("./node_modules/ollama/package.json", import.meta.url);
const { version } = JSON.parse(readFileSync(manifest));
const client = new Ollama({ host: url });
const asked = { model: "scripted", messages: [user(sky)], think: true };
const useTools = async (stream) => {
  const cities = [], messages = [user(weather)];
  const tools = [{ type: "function", function: { name: "get_weather", description, parameters } }];
  for (;;) {
    const reply = await client.chat({ ...asked, messages, tools, stream });
    const message = { role: "assistant", content: "", thinking: "", tool_calls: [] };
    for await (const part of stream ? reply : [reply]) {
      message.content += part.message.content;
      message.thinking += part.message.thinking ?? "";
      message.tool_calls.push(...(part.message.tool_calls ?? []));
    }
    if (!message.tool_calls.length) return [...cities, message.content];
    messages.push(message);
    for (const { function: called } of message.tool_calls) {
      const content = lookUp(cities)(called.arguments);
      messages.push({ role: "tool", tool_name: called.name, content });
    }
  }
};

await report(version, {
  thinking: async () => {
    const { message } = await client.chat(asked);
    return [message.thinking, message.content];
  },
  "thinking streamed": async () => {
    let [thought, answer] = ["", ""];
    for await (const { message } of await client.chat({ ...asked, stream: true })) {
      thought += message.thinking ?? "";
      answer += message.content;
    }
    return [thought, answer];
  },
  tools: () => useTools(false),
  "tools streamed": () => useTools(true),
  structure: async () => {
    const reply = await client.chat({ ...asked, messages: [user(json)], format: person });
    return JSON.parse(reply.message.content);
  },
});
