// The Vercel AI SDK's providers against the running stack. Prints {"ok": how many checks held}.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, streamText } from "ai";

const baseURL = `${process.env.AISCALE_URL}/v1`;
const apiKey = process.env.AISCALE_API_KEY;
const name = process.env.CHAT_MODEL;
const prompt = "What is the capital of France?";
const common = { temperature: 0, maxOutputTokens: 40, maxRetries: 0 };
let ok = 0;

const compatible = createOpenAICompatible({ name: "aiscale", baseURL, apiKey, includeUsage: true });
const whole = await generateText({ model: compatible(name), prompt, ...common });
assert.match(whole.text, /Paris/);
assert.ok(whole.usage.outputTokens > 1);
ok++;

let streamed = "";
const stream = streamText({ model: compatible(name), prompt, ...common });
for await (const piece of stream.textStream) streamed += piece;
assert.equal(streamed, whole.text);
assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
ok++;

const { embeddings } = await embedMany({ model: compatible.textEmbeddingModel(process.env.EMBED_MODEL), values: ["one", "two"] });
assert.equal(embeddings[1].length, 384);
ok++;

const openai = createOpenAI({ baseURL, apiKey });
const chat = await generateText({ model: openai.chat(name), system: "Answer in one short sentence.", prompt, ...common });
assert.match(chat.text, /Paris/);
ok++;

let responded = "";
for await (const piece of streamText({ model: openai.responses(name), prompt, ...common }).textStream) responded += piece;
assert.match(responded, /Paris/);
ok++;
console.log(JSON.stringify({ ok }));
