import Anthropic from "@anthropic-ai/sdk";
import { VERSION } from "@anthropic-ai/sdk/version";
import { description, json, lookUp, parameters, person, report, sky, url, user, weather }
  from "./report.mjs";

const client = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
const asked = {
  model: "scripted", max_tokens: 4000, messages: [user(sky)],
  thinking: { type: "enabled", budget_tokens: 1024 } };
const parts = ({ content: [thought, text] }) => [thought.thinking, text.text];
const useTools = async (stream) => {
  const cities = [], messages = [user(weather)];
  const tools = [{ name: "get_weather", description, input_schema: parameters }];
  for (;;) {
    const body = { ...asked, messages, tools };
    const reply = stream
      ? await client.messages.stream(body).finalMessage()
      : await client.messages.create(body);
    const used = reply.content.filter((block) => block.type === "tool_use");
    if (!used.length) return [...cities, reply.content.at(-1).text];
    const results = used.map((block) => (
      { type: "tool_result", tool_use_id: block.id, content: lookUp(cities)(block.input) }));
    messages.push({ role: "assistant", content: reply.content }, user(results));
  }
};

await report(VERSION, {
  thinking: async () => parts(await client.messages.create(asked)),
  "thinking streamed": async () => {
    let [thought, answer] = ["", ""];
    const stream = client.messages.stream(asked);
    stream.on("thinking", (text) => { thought += text; }).on("text", (text) => { answer += text; });
    await stream.finalMessage();
    return [thought, answer];
  },
  tools: () => useTools(false),
  "tools streamed": () => useTools(true),
  "tool runner": async () => {
    const cities = [];
    const tool = {
      type: "custom", name: "get_weather", description, input_schema: parameters,
      parse: (input) => input, run: lookUp(cities) };
    const last = await client.beta.messages.toolRunner(
      { ...asked, messages: [user(weather)], tools: [tool] });
    return [...cities, last.content.at(-1).text];
  },
  structure: async () => {
    const reply = await client.messages.create({
      ...asked, messages: [user(json)],
      output_config: { format: { type: "json_schema", schema: person } } });
    return JSON.parse(reply.content.at(-1).text);
  },
});
