// OpenAI's JavaScript client, unchanged, drives the whole loop: upload, train, follow, serve, tune, pause, delete.
// node loop.mjs http://127.0.0.1:5000/v1; prints a line for each part that holds, and ends with an error otherwise.

import assert from "node:assert/strict";
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "-" });
const jobs = client.fineTuning.jobs;
const sentence = "The quick brown fox jumps over the lazy dog. ";
const tiny = { from_scratch: true, tokenizer: "char", n_layer: 1, n_head: 2, n_embd: 32, block_size: 32 };
const fast = { eval_iters: 1, sample_tokens: 0, threads: 1, batch_size: 8 };

async function all(pages) {
  const found = [];
  for await (const item of pages) found.push(item);
  return found;
}

async function until(holds) {
  for (let i = 0; i < 900; i++) {
    const found = await holds();
    if (found) return found;
    await new Promise((done) => setTimeout(done, 100));
  }
  throw new Error(`${holds} was not to be`);
}

const isOver = (job) => ["succeeded", "failed", "cancelled"].includes(job.status) && job;
const ended = (id) => until(async () => isOver(await jobs.retrieve(id)));
const step = async (id) => (await jobs.retrieve(id)).iter_num ?? 0;

async function uploaded(name, lines) {
  const text = lines.map((line) => JSON.stringify(line) + "\n").join("");
  const file = await client.files.create({ file: await toFile(Buffer.from(text), name), purpose: "fine-tune" });
  const found = await client.files.waitForProcessing(file.id, { pollInterval: 200 });
  assert.equal(found.status, "processed");
  assert.equal(await (await client.files.content(file.id)).text(), text);
  return file.id;
}

// ---- a model from scratch

const file = await uploaded("fox.jsonl", Array(40).fill({ text: sentence.repeat(4) }));
assert.ok((await all(client.files.list({ limit: 1, purpose: "fine-tune" }))).some((found) => found.id === file));
console.log("upload");

const created = await jobs.create({
  model: "nano", training_file: file, suffix: "fox", seed: 3,
  ...tiny, ...fast, max_iters: 120, eval_interval: 60, log_interval: 4, learning_rate: 0.01,
});
const trained = await ended(created.id);
assert.equal(trained.status, "succeeded", JSON.stringify(trained.error));
const events = await all(jobs.listEvents(created.id, { limit: 5 }));
assert.ok(events.length > 20 && new Set(events.map((event) => event.id)).size === events.length);
const saved = await all(jobs.checkpoints.list(created.id, { limit: 1 }));
assert.equal(saved[0].step_number, 120);
console.log("train");

const ids = (await all(client.models.list())).map((model) => model.id);
for (const model of [trained.fine_tuned_model, saved[0].fine_tuned_model_checkpoint]) {
  assert.ok(ids.includes(model));
  assert.equal((await client.models.retrieve(model)).id, model);
  const about = { model, prompt: "The quick", max_tokens: 20, temperature: 0 };
  const { text } = (await client.completions.create(about)).choices[0];
  assert.equal("The quick" + text, sentence.slice(0, 29));
  const chunks = await all(await client.completions.create({ ...about, stream: true }));
  assert.equal(chunks.map((chunk) => chunk.choices[0].text).join(""), text);
}
const vectors = await client.embeddings.create({ model: trained.fine_tuned_model, input: ["The quick", "brown"] });
assert.deepEqual(vectors.data.map((one) => one.embedding.length), [32, 32]);
console.log("serve");

// ---- a chat model, tuned on it

const questions = [...Array(40).keys()].map((i) => ({
  messages: [{ role: "user", content: "the ".repeat(1 + (i % 4)) + "fox".repeat(1 + (i >> 2)) },
             { role: "assistant", content: "jumps." }],
}));
const tuned = await ended((await jobs.create({
  model: trained.fine_tuned_model, training_file: await uploaded("chat.jsonl", questions), suffix: "chat",
  method: { type: "supervised", supervised: { hyperparameters: { learning_rate_multiplier: 2 } } },
  ...fast, max_iters: 12,
})).id);
assert.equal(tuned.status, "succeeded", JSON.stringify(tuned.error));
const talk = { model: tuned.fine_tuned_model, messages: questions[0].messages.slice(0, 1), temperature: 0, max_tokens: 8 };
const said = (await client.chat.completions.create(talk)).choices[0].message;
const deltas = await all(await client.chat.completions.create({ ...talk, stream: true }));
assert.equal(deltas.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), said.content);
console.log("tune and chat");

// ---- pausing, and what is refused

const long = await jobs.create({ model: "nano", training_file: file, ...tiny, ...fast, max_iters: 100000, log_interval: 1 });
await until(async () => (await step(long.id)) > 0);
assert.equal((await jobs.pause(long.id)).status, "paused");
const before = await step(long.id);
assert.ok(["queued", "running"].includes((await jobs.resume(long.id)).status));
await until(async () => (await step(long.id)) > before);
assert.equal((await jobs.cancel(long.id)).status, "cancelled");
await assert.rejects(jobs.cancel(long.id), OpenAI.BadRequestError);
await assert.rejects(client.completions.create({ model: "nobody", prompt: "a" }), OpenAI.NotFoundError);
await assert.rejects(client.completions.create({ model: "random", prompt: "a", temperature: -1 }), (error) =>
  error instanceof OpenAI.BadRequestError && error.param === "temperature" && Boolean(error.requestID));
console.log("pause and refuse");

assert.equal((await client.models.delete(tuned.fine_tuned_model)).deleted, true);
await assert.rejects(client.models.retrieve(tuned.fine_tuned_model), OpenAI.NotFoundError);
assert.equal((await client.files.delete(file)).deleted, true);
console.log("delete");
