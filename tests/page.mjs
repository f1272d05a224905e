// Prints the rows of the job table that web/static/app.js, in the folder argv[2], makes of the jobs in argv[3].
// The document is a fake that keeps elements and their children; a text that was set is never more than a text.

class Element {
  children = [];
  elements = new Proxy({}, { get: () => new Element() });
  options = [];
  value = "";
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  addEventListener() {}
}
const elements = {};
const text = (node) => (node instanceof Element ? node.children.map(text).join(" ") : node);
const answers = {
  "/api/jobs": { jobs: JSON.parse(process.argv[3]) },
  "/api/models": { pretrained_models: [], trained_models: [] },
  "/api/datasets": { datasets: [] },
  "/api/status": { model: null },
};

globalThis.document = { createElement: () => new Element(), getElementById: (id) => (elements[id] ??= new Element()) };
globalThis.fetch = async (path) => ({ ok: true, json: async () => answers[path] });
globalThis.setTimeout = () => {}; // it looks once
process.on("exit", () => console.log(JSON.stringify(elements["job-rows"].children.map(text))));
await import(`${process.argv[2]}/app.js`);
