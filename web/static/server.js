// Talking to the server: requests that fail with the server's sentence, and the events of a streamed reply.

const sentence = (error) => error?.message ?? error; // under /v1 an error is an object

export async function send(path, options = {}) {
  const reply = await fetch(path, options);
  if (reply.ok) return reply;
  const body = await reply.json().catch(() => ({}));
  throw new Error(sentence(body.error) ?? `the server answered ${reply.status}`);
}

export const get = async (path) => (await send(path)).json();

export const post = (path, body, more = {}) =>
  send(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), ...more });

/** Give the events of a streamed reply; ends at [DONE], fails on an error event or an early end. */
export async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the text did");
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      if (!frame.startsWith("data: ")) continue;
      if (frame === "data: [DONE]") return;
      const event = JSON.parse(frame.slice(6));
      if (event.error) throw new Error(sentence(event.error));
      yield event;
    }
  }
}
