import OpenAI from "openai";
import { VERSION } from "openai/version";
import { description, json, lookUp, parameters, person, report, sky, url, user, weather }
  from "./report.mjs";

const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const asked = { model: "scripted", messages: [user(sky)] };
const runTools = async (stream) => {
  const cities = [];
  const tool = {
    type: "function",
    function: {
      name: "get_weather", description, parameters, parse: JSON.parse, function: lookUp(cities) },
  };
  const run = client.chat.completions.runTools(
    { ...asked, messages: [user(weather)], tools: [tool], stream });
  const answer = await run.finalContent();
  return [...cities, answer];
};

await report(VERSION, {
  thinking: async () => {
    const { message } = (await client.chat.completions.create(asked)).choices[0];
    return [message.reasoning_content, message.content];
  },
  "thinking streamed": async () => {
    let [thought, answer] = ["", ""];
    for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
      thought += chunk.choices[0].delta.reasoning_content ?? "";
      answer += chunk.choices[0].delta.content ?? "";
    }
    return [thought, answer];
  },
  tools: () => runTools(false),
  "tools streamed": () => runTools(true),
  structure: async () => {
    const reply = await client.chat.completions.parse({
      ...asked, messages: [user(json)],
      response_format: {
        type: "json_schema", json_schema: { name: "person", strict: true, schema: person } },
    });
    return JSON.parse(reply.choices[0].message.content);
  },
});
