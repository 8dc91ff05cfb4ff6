// The official OpenAI client for JavaScript against the running stack. Prints {"ok": how many checks held}.
import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";

const model = process.env.CHAT_MODEL;
const client = new OpenAI({ baseURL: `${process.env.AISCALE_URL}/v1`, apiKey: process.env.AISCALE_API_KEY, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
let ok = 0;

const answer = await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 40 });
assert.match(answer.choices[0].message.content, /Paris/);
ok++;

let streamed = "";
for await (const chunk of await client.chat.completions.create({ model, messages, temperature: 0, max_tokens: 40, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
assert.equal(streamed, answer.choices[0].message.content);
ok++;

const response = await client.responses.create({ model, input: messages[0].content, temperature: 0, max_output_tokens: 40 });
assert.match(response.output_text, /Paris/);
const kinds = [];
for await (const event of await client.responses.create({
  model, input: "And of Italy?", previous_response_id: response.id, max_output_tokens: 16, stream: true,
})) {
  kinds.push(event.type);
}
assert.equal(kinds[0], "response.created");
assert.ok(["response.completed", "response.incomplete"].includes(kinds.at(-1)));
ok++;

const vectors = await client.embeddings.create({ model: process.env.EMBED_MODEL, input: ["one", "two"] });
assert.equal(vectors.data[0].embedding.length, 384);
ok++;

const file = await client.files.create({ file: await toFile(Buffer.from("{}\n"), "x.jsonl"), purpose: "batch" });
assert.equal((await client.files.list()).data.some((item) => item.id === file.id), true);
assert.equal((await client.files.delete(file.id)).deleted, true);
ok++;

await assert.rejects(client.chat.completions.create({ model: "gpt-4", messages }), OpenAI.NotFoundError);
await assert.rejects(client.chat.completions.create({ model, messages, temperature: 9 }), OpenAI.BadRequestError);
ok++;
console.log(JSON.stringify({ ok }));
