// openai-node, as OpenAI documents it. What is asked is what asked.py asks.
import { createInterface } from "node:readline";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none" });
const question = "What is the capital of France?";
const asked = { messages: [{ role: "user", content: question }], temperature: 0, max_tokens: 100 };
const prompt = `<|im_start|>user\n${question}<|im_end|>\n<|im_start|>assistant\n`;
const text = { type: "string", maxLength: 20 };
const object = (properties) => ({
  type: "object",
  properties,
  required: Object.keys(properties),
  additionalProperties: false,
});
const answer = { type: "json_schema", json_schema: { name: "Answer", schema: object({ answer: text, reason: text }) } };
const tool = {
  type: "function",
  function: { name: "look_up", description: "Look something up.", parameters: { ...object({ query: text }), maxProperties: 1 } },
};
const create = async (fields) => (await client.chat.completions.create({ ...asked, ...fields })).choices[0];

const features = {
  chat: async (model) => (await create({ model })).message.content,
  streaming: async (model) => {
    const pieces = [];
    const chunks = await client.chat.completions.create({ ...asked, model, stream: true });
    for await (const chunk of chunks) pieces.push(chunk.choices[0]?.delta?.content ?? "");
    return pieces;
  },
  structured: async (model) => {
    const parsed = await client.chat.completions.parse({ ...asked, model, response_format: answer });
    return JSON.parse(parsed.choices[0].message.content);
  },
  tools: async (model) => {
    const named = { type: "function", function: { name: "look_up" } };
    const [call] = (await create({ model, tools: [tool], tool_choice: named })).message.tool_calls;
    return { [call.function.name]: JSON.parse(call.function.arguments) };
  },
  logprobs: async (model) => (await create({ model, logprobs: true, top_logprobs: 2 })).logprobs.content.map((token) => token.logprob),
  embeddings: async (model) => (await client.embeddings.create({ model, input: question })).data[0].embedding,
  responses: async (model) =>
    (await client.responses.create({ model, input: question, temperature: 0, max_output_tokens: 100 })).output_text,
  completion: async (model) =>
    (await client.completions.create({ model, prompt,  temperature: 0, max_tokens: 16 })).choices[0].text,
};

console.log(JSON.stringify(Object.fromEntries(Object.keys(features).map((name) => [name, null]))));
for await (const line of createInterface({ input: process.stdin })) {
  const { feature, model } = JSON.parse(line);
  const told = await features[feature](model).then(
    (told) => ({ told }),
    (error) => ({ error: `${error.name}: ${error.message}` }),
  );
  console.log(JSON.stringify(told));
}
