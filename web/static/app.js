// The web page: choose the model, start and watch training jobs, manage datasets; text.js generates and talks.
// Plain DOM and fetch, no library.

import { $, act, el, fields, notice, svg } from "./dom.js";
import { get, post, send } from "./server.js";
import { suit } from "./text.js";

const JOB_SECONDS = 2;
const STATUS_SECONDS = 5;
const ACTIVE = ["queued", "running"];

// ---- the model

const millions = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} billion` : `${(n / 1e6).toFixed(1)} million`);

let served = ""; // the id of the loaded model

function showStatus(status) {
  const model = status.model;
  served = model?.id ?? "";
  suit(model);
  $("status").className = model ? "ok" : "";
  $("status").textContent = model ? `${model.id} on ${model.device}` : "no model loaded";
  $("unload").disabled = !model;
  const facts = model && {
    Parameters: millions(model.parameters),
    Context: `${model.block_size} tokens`,
    Tokenizer: model.tokenizer,
    Runs: `${model.runner}, ${model.dtype}, ${model.device}`,
    Queue: `${status.queue.running} running, ${status.queue.waiting} waiting`,
  };
  const pairs = Object.entries(facts ?? {}).flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);
  $("model-facts").replaceChildren(...pairs);
}

async function refreshStatus() {
  try {
    showStatus(await get("/api/status"));
  } catch (error) {
    $("status").className = "bad";
    $("status").textContent = error.message;
  }
}

const option = (label, value) => el("option", { value: JSON.stringify(value) }, label);

async function refreshModels() {
  const { pretrained_models: names, trained_models: runs } = await get("/api/models");
  const chosen = $("models").value;
  const trained = el("optgroup", { label: "Trained here" });
  trained.append(...runs.map((run) => option(run.name, { model_path: run.path })));
  const pretrained = el("optgroup", { label: "Pretrained" });
  pretrained.append(...names.toReversed().map((name) => option(name, { model_type: name })));
  $("models").replaceChildren(...(runs.length ? [trained] : []), pretrained);
  const serving = [...$("models").options].find((entry) => entry.text === served);
  $("models").value = chosen || serving?.value || $("models").value;
  refreshStarts(names, runs);
}

/** Offer what a training may start with: presets, pretrained models, and runs. */
function refreshStarts(names, runs) {
  const select = $("start");
  const chosen = select.value;
  const presets = ["nano", "micro", "mini"].map((name) => option(`${name}, from scratch`, { model_type: name }));
  const tuned = names.map((name) => option(`${name}, fine-tuned`, { model_type: name }));
  select.replaceChildren(...presets, ...tuned, ...runs.map(({ name }) => option(`${name}, fine-tuned`, { init_from: name })));
  if (chosen) select.value = chosen;
  if (select.selectedIndex < 0) select.selectedIndex = 0;
}

async function load(choice) {
  $("status").className = "";
  $("status").textContent = "loading…";
  try {
    await post("/api/load_model", choice);
  } finally {
    await refreshStatus();
  }
}

$("load-form").addEventListener("submit", (event) => {
  event.preventDefault();
  act(() => load(JSON.parse($("models").value)));
});
$("unload").addEventListener("click", () => act(async () => { await post("/api/unload_model", {}); await refreshStatus(); }));

// ---- training jobs

let lastStates = "";
let shown = null; // { name, rows, after }: the job whose curve is drawn

const number = (value, digits = 3) => (value === null || value === undefined ? "" : value.toFixed(digits));

function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  const [h, m, s] = [seconds / 3600, (seconds / 60) % 60, seconds % 60].map(Math.floor);
  return h ? `${h}h${m}m` : m ? `${m}m${s}s` : `${s}s`;
}

function jobButtons(job) {
  const button = (label, action) =>
    el("button", { className: "small", onclick: () => act(async () => { await action(); await refreshJobs(); }) }, label);
  const path = `/api/jobs/${encodeURIComponent(job.name)}`;
  const curve = button("Curve", async () => { shown = { name: job.name, rows: [], after: -1 }; });
  if (ACTIVE.includes(job.state)) return [curve, button("Stop", () => post(`${path}/stop`, {}))];
  const remove = async () => {
    if (confirm(`Delete the run ${job.name} with its checkpoints?`)) await send(path, { method: "DELETE" });
  };
  return [
    curve,
    button("Load", () => load({ model_path: `out/${job.name}/ckpt.pt` })),
    button("Resume", () => post(`${path}/resume`, {})),
    button("Delete", remove),
  ];
}

/** Say which place a job has in the queue, and why it waits. */
function waits(job) {
  if (!job.queue_position) return "";
  return `${job.name} has place ${job.queue_position} in the queue${job.queue_reason ? ` (${job.queue_reason})` : ""}`;
}

function jobRow(job) {
  const bar = el("progress", { max: job.max_iters ?? 1, value: job.iter_num ?? 0 });
  const cells = [
    job.name, job.state, el("span", {}, `${job.iter_num ?? 0} / ${job.max_iters ?? "?"}`, bar), number(job.loss),
    number(job.best_val_loss), number(job.tokens_per_second, 0), duration(job.state === "running" ? job.eta_seconds : null),
  ].map((content) => el("td", {}, content));
  const row = el("tr", {}, ...cells, el("td", {}, ...jobButtons(job)));
  const below = (className, text) => (text ? [el("tr", {}, el("td", { className, colSpan: 8 }, text))] : []);
  return [row, ...below("note", waits(job)), ...below("error", job.error ?? job.damaged)];
}

async function refreshJobs() {
  const { jobs } = await get("/api/jobs");
  const states = jobs.map((job) => `${job.name} ${job.state}`).join();
  if (states !== lastStates) await refreshModels(); // a job that ended has left a model
  lastStates = states;
  $("job-rows").replaceChildren(...jobs.flatMap(jobRow));
  $("no-jobs").hidden = jobs.length > 0;
  $("job-table").hidden = !jobs.length;
  const current = jobs.find((job) => job.state === "running");
  if (!shown && current) shown = { name: current.name, rows: [], after: -1 };
  if (shown && !jobs.some((job) => job.name === shown.name)) shown = null;
  await refreshCurve();
}

async function refreshCurve() {
  $("curve").hidden = !shown;
  if (!shown) return;
  const { metrics } = await get(`/api/jobs/${encodeURIComponent(shown.name)}/metrics?after=${shown.after}`);
  shown.rows.push(...metrics);
  shown.after = shown.rows.at(-1)?.iter_num ?? -1;
  $("curve-name").textContent = shown.name;
  drawCurve(shown.rows);
  const { samples: [sample] } = await get(`/api/jobs/${encodeURIComponent(shown.name)}/samples?limit=1`);
  $("sample").textContent = sample ? `At iteration ${sample.iter_num}: ${sample.prompt}${sample.text}` : "";
}

/** Draw train and validation loss over iterations. */
function drawCurve(rows) {
  const [left, right, top, bottom] = [44, 628, 10, 196];
  const points = (key) => rows.filter((row) => Number.isFinite(row[key])).map((row) => [row.iter_num, row[key]]);
  const [train, val] = [points("loss"), points("val_loss")];
  const all = [...train, ...val];
  $("plot").replaceChildren();
  if (!all.length) return;
  const most = Math.max(1, ...all.map(([x]) => x));
  const [low, high] = [Math.min(...all.map(([, y]) => y)), Math.max(...all.map(([, y]) => y))];
  const span = high - low || 1;
  const x = (value) => left + ((right - left) * value) / most;
  const y = (value) => bottom - ((bottom - top) * (value - low)) / span;
  for (let k = 0; k <= 4; k++) {
    const value = low + (span * k) / 4;
    $("plot").append(
      svg("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }),
      svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(2)),
    );
  }
  $("plot").append(svg("text", { x: right, y: bottom + 17, "text-anchor": "end" }, `iteration ${most}`));
  for (const [name, line] of [["train", train], ["val", val]]) {
    $("plot").append(svg("polyline", { class: name, points: line.map(([a, b]) => `${x(a)},${y(b)}`).join(" ") }));
  }
  for (const [a, b] of val) $("plot").append(svg("circle", { class: "val", cx: x(a), cy: y(b), r: 2.6 }));
}

$("train-form").addEventListener("submit", (event) => {
  event.preventDefault();
  act(async () => {
    const body = { ...fields(event.target), ...JSON.parse($("start").value) };
    body.output_dir = `out/${body.output_dir}`;
    const { job } = await (await post("/api/train", body)).json();
    shown = { name: job.name, rows: [], after: -1 };
    await refreshJobs();
  });
});

// ---- datasets

const size = (n) => (n >= 1e6 ? `${(n / 1e6).toFixed(1)} MB` : n >= 1e3 ? `${(n / 1e3).toFixed(1)} kB` : `${n} B`);

async function refreshDatasets() {
  const { datasets } = await get("/api/datasets");
  $("dataset-rows").replaceChildren(...datasets.map((dataset) => {
    const remove = () => act(async () => {
      if (!confirm(`Delete the dataset ${dataset.name}?`)) return;
      await send(`/api/datasets/${encodeURIComponent(dataset.name)}`, { method: "DELETE" });
      await refreshDatasets();
    });
    const cells = [dataset.name, dataset.bytes ? size(dataset.bytes) : "to be fetched", String(dataset.documents ?? "")];
    const button = el("button", { className: "small", onclick: remove }, "Delete");
    return el("tr", {}, ...cells.map((text) => el("td", {}, text)), el("td", {}, ...(dataset.bytes ? [button] : [])));
  }));
  const select = $("train-form").elements.dataset;
  const chosen = select.value || "stdlib";
  select.replaceChildren(...datasets.map(({ name }) => el("option", {}, name)));
  if (datasets.some(({ name }) => name === chosen)) select.value = chosen;
}

$("upload-form").addEventListener("submit", (event) => {
  event.preventDefault();
  act(async () => {
    await send("/api/datasets", { method: "POST", body: new FormData(event.target) });
    event.target.reset();
    await refreshDatasets();
  });
});

// ---- the page

/** Call `refresh` now and then again and again, never twice at once, and not while the page is hidden. */
async function repeat(refresh, seconds) {
  for (;;) {
    if (!document.hidden) await refresh().catch(() => {});
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
  }
}

async function start() {
  await refreshStatus();
  await refreshModels();
  await refreshDatasets();
}

$("notice").addEventListener("click", () => notice(""));
act(start);
repeat(refreshStatus, STATUS_SECONDS);
repeat(refreshJobs, JOB_SECONDS);
