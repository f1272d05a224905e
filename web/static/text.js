// Text as it comes: the continuation of a prompt, or a conversation with a model that was trained on chats.

import { $, act, el, fields } from "./dom.js";
import { events, post } from "./server.js";

let running = null; // the AbortController of the stream that is shown
let served = ""; // the id of the loaded model
let chats = false; // whether the loaded model was trained on chats
let conversation = []; // its messages so far: the server keeps none

/** Post a request and pass on the events of its reply as they come. */
async function stream(path, body, take) {
  running = new AbortController();
  $("go").disabled = true;
  $("halt").disabled = false;
  $("speed").textContent = "…";
  try {
    const reply = await post(path, { ...body, stream: true }, { signal: running.signal });
    for await (const event of events(reply)) {
      take(event);
      $("output").scrollTop = $("output").scrollHeight;
    }
  } finally {
    running = null;
    $("go").disabled = false;
    $("halt").disabled = true;
    if ($("speed").textContent === "…") $("speed").textContent = "";
  }
}

/** Return what shows how many tokens came and how fast, counted from now. */
function stopwatch() {
  const begun = performance.now();
  return (usage, rest = "") => {
    const tokens = usage.completion_tokens;
    const speed = Math.round((1000 * tokens) / (performance.now() - begun));
    $("speed").textContent = `${tokens} tokens, ${speed} per second${rest}`;
  };
}

async function generate() {
  const body = { ...fields($("generate-form")), prompt: $("prompt").value };
  const written = el("span");
  $("output").replaceChildren(el("span", { className: "prompt" }, body.prompt), written);
  const show = stopwatch();
  await stream("/api/generate", body, (event) => {
    if (event.text !== undefined) written.append(event.text);
    else show(event.usage, `, seed ${event.parameters.seed}`);
  });
}

async function talk() {
  const { prompt, max_new_tokens, ...sampling } = fields($("generate-form")); // an answer has the room that there is
  if (!prompt) return;
  const messages = [...conversation, { role: "user", content: prompt }];
  const [asked, written] = [el("p", { className: "prompt" }, prompt), el("p")];
  $("output").append(asked, written);
  $("prompt").value = "";
  const [spoken, show] = [conversation, stopwatch()];
  try {
    await stream("/v1/chat/completions", { ...sampling, messages, stream_options: { include_usage: true } }, (event) => {
      written.append(event.choices[0]?.delta.content ?? "");
      if (event.usage) show(event.usage);
    });
  } catch (error) {
    if (error.name !== "AbortError") {
      asked.remove();
      written.remove();
      $("prompt").value = prompt;
      throw error;
    }
  }
  if (conversation === spoken) conversation = [...messages, { role: "assistant", content: written.textContent }];
}

function beginConversation() {
  running?.abort();
  conversation = [];
  $("output").replaceChildren();
  $("speed").textContent = "";
}

/** Make the form one for the loaded model, null if there is none: to chat, or to continue text. */
export function suit(model) {
  const changed = (model?.id ?? "") !== served;
  served = model?.id ?? "";
  if (!changed || !(chats || model?.chat)) return;
  beginConversation();
  chats = model?.chat ?? false;
  $("generate-title").textContent = chats ? "Chat" : "Generate";
  $("go").textContent = chats ? "Send" : "Generate";
  $("fresh").hidden = !chats;
  $("new-tokens").hidden = chats;
  $("prompt").placeholder = chats ? "Write a message…" : "Write the beginning of a text…";
  if (chats && $("prompt").value === $("prompt").defaultValue) $("prompt").value = "";
}

$("generate-form").addEventListener("submit", (event) => {
  event.preventDefault();
  act(chats ? talk : generate);
});
$("fresh").addEventListener("click", beginConversation);
$("halt").addEventListener("click", () => running?.abort());
$("prompt").addEventListener("keydown", (event) => {
  const sends = event.ctrlKey || event.metaKey || (chats && !event.shiftKey && !event.isComposing);
  if (event.key !== "Enter" || !sends || running) return;
  event.preventDefault();
  $("generate-form").requestSubmit();
});
