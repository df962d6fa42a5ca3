// The live page: asks /ui/metrics for new lines once a second and draws what they say.

import { byId, compact, dollars, duration, h, icon, number, percent, themeButton } from "./dom.js";
import { LineChart } from "./chart.js";
import { RunState, againstPlan, series } from "./runstate.js";

const [ONE, TWO, THREE, FOUR] = [1, 2, 3, 4].map((n) => `var(--series-${n})`);
const share = (value, exact) => percent(value, exact ? 1 : 0);
const plain = (value, exact) => (exact ? (Math.abs(value) < 0.1 ? Number(value.toPrecision(2)).toString() : number(value, Math.abs(value) < 10 ? 3 : 1)) : Number(value.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 6 }));

const CHARTS = {
  pretrain: [
    { title: "Loss", note: "Next token, and the token after it (MTP)", lines: [["loss", "next token", ONE], ["mtp_loss", "MTP", TWO]], format: plain },
    { title: "Tokens a second", lines: [["time.tokens_per_second", "tokens/s", ONE]], format: compact },
    { title: "Utilisation", note: "Of this machine's own matrix products", lines: [["time.mfu", "share of the peak", THREE]], format: share, low: 0 },
    { title: "Gradient norm", lines: [["grad_norm", "norm", THREE]], format: plain },
    { title: "Learning rate", lines: [["lr", "rate", TWO]], format: plain },
    { title: "Load imbalance", note: "Largest expert load over the mean, minus 1", lines: [["max_violation", "largest violation", FOUR]], format: plain },
  ],
  grpo: [
    { title: "Reward and accuracy", note: "Of sampled answers", lines: [["accuracy", "accuracy", ONE], ["reward", "reward", TWO]], format: share, low: 0, high: 1 },
    { title: "Thinking length", note: "Tokens", lines: [["length_right", "right", ONE], ["length_wrong", "wrong", FOUR], ["thinking_length", "thought", THREE]], format: plain },
    { title: "Shares", lines: [["zero_spread", "zero-spread groups", ONE], ["truncated", "truncated", FOUR], ["clip_share", "clipped", TWO]], format: share, low: 0 },
    { title: "Entropy", lines: [["entropy", "nats a token", THREE]], format: plain },
    { title: "Log-prob gap", note: "Trainer against engine, mean absolute", lines: [["logprob_gap", "gap", TWO]], format: plain, low: 0 },
    { title: "Tokens a second", lines: [["time.tokens_per_second", "tokens/s", ONE]], format: compact },
    { title: "Utilisation", note: "Of this machine's own matrix products", lines: [["time.mfu", "share of the peak", THREE]], format: share, low: 0 },
    { title: "Loss", note: "GRPO's starts near 0, and that is right", lines: [["loss", "GRPO", ONE], ["mtp_loss", "MTP", TWO]], format: plain },
    { title: "Gradient norm", lines: [["grad_norm", "norm", THREE]], format: plain },
  ],
};
const TITLES = { pretrain: "Pretraining", grpo: "Reinforcement learning", eval: "Evaluation" };

const page = { state: new RunState(), next: 0, mark: "", charts: new Map(), smoothing: 0.6, reached: false };

// ---- reading

async function poll() {
  let more = false;
  try {
    const response = await fetch(`/ui/metrics?from=${page.next}&mark=${page.mark}`);
    if (!response.ok) throw new Error(String(response.status));
    const answer = await response.json();
    if (answer.reset) forget();
    for (const line of answer.lines) page.state.add(line);
    page.next = answer.next;
    page.mark = answer.mark;
    more = answer.lines.length > 0 && answer.next < answer.size;
    const news = answer.lines.length || answer.reset || !page.reached;
    page.reached = true;
    if (news && !more) draw();
    drawState(true);
  } catch (error) {
    if (!(error instanceof TypeError) && !/^\d+$/.test(error.message)) throw error;
    drawState(false);
  } finally {
    setTimeout(poll, more ? 0 : document.hidden ? 5000 : 1000);
  }
}

function forget() {
  page.state = new RunState();
  page.charts.clear();
  byId("charts").replaceChildren();
}

// ---- drawing

function drawState(up) {
  const { state } = page, pill = byId("state"), current = state.current;
  const old = state.lastUnix ? Date.now() / 1000 - state.lastUnix : 0;
  const quiet = old > (current?.kind === "eval" ? 1200 : 120); // an evaluation writes its lines at its end
  const words = !up ? "the server does not answer" : !state.lines ? "no run" : state.done ? "finished"
    : quiet ? `no news for ${duration(old)}` : current ? `running ${current.name}` : "running";
  pill.className = `pill ${up && !state.done && state.lines && !quiet ? "busy" : state.done && up ? "" : "off"}`;
  pill.lastElementChild.textContent = words;
}

function draw() {
  const { state } = page, any = state.lines > 0;
  byId("empty").hidden = any;
  byId("run").hidden = !any;
  if (!any) return;
  const { run } = state;
  byId("title").textContent = run?.recipe ?? "Run";
  byId("subtitle").textContent = [run?.description, run?.parameters && `${compact(run.parameters)} parameters, ${compact(run.active_parameters)} active per token.`].filter(Boolean).join(" ");
  drawStages();
  drawNotes();
  drawTiles();
  drawEvals();
  drawCharts();
  drawCosts();
  drawExperts();
  drawSamples();
}

function drawStages() {
  const { state } = page;
  byId("stages").replaceChildren(...[...state.stages.values()].map((stage) => {
    const { at, share: done, left } = state.progress(stage);
    const unit = stage.unit === "tokens" ? compact : number;
    const whole = stage.kind === "eval" || (!at && done === 1); // its lines come at its end
    const amount = !stage.budget ? "" : whole ? `${unit(stage.budget)} ${stage.unit}` : `${unit(Math.min(at, stage.budget))} / ${unit(stage.budget)} ${stage.unit}`;
    const status = { done: "done", waiting: "waiting", running: Number.isFinite(left) ? `${duration(Math.max(0, left))} left` : "running" }[stage.status];
    return h("div", { class: `stage ${stage.status}${stage.kind === "eval" ? " unknown" : ""}` },
      h("div", { class: "stage-name" }, stage.status === "done" ? icon("check") : h("i", {}), stage.name, h("span", { class: "soft" }, status)),
      h("div", { class: "bar", role: "progressbar", "aria-label": stage.name, "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * done) }, h("i", { style: `width:${(100 * done).toFixed(2)}%` })),
      h("div", { class: "stage-amount" }, h("span", {}, amount), h("span", {}, stage.seconds ? duration(stage.seconds) : "")));
  }));
}

function drawNotes() {
  const { state } = page;
  const skipped = [...state.stages.values()].filter((stage) => stage.last?.skipped > 0).map((stage) => `${stage.name}: ${stage.last.skipped} of its updates skipped${stage.bad.length ? `; the last at step ${stage.bad.at(-1).step}: ${stage.bad.at(-1).why}` : ""}`);
  const notes = [...state.notes, ...skipped];
  byId("notes").hidden = !notes.length;
  byId("notes").replaceChildren(...notes.slice(-5).map((text) => h("p", {}, text)));
}

function drawTiles() {
  const { state } = page, { run } = state, { value, note } = state.accuracy, last = state.newest?.last;
  const tile = (label, text, small) => h("div", { class: "tile" }, h("span", {}, label), h("strong", {}, text), h("small", {}, small));
  byId("tiles").replaceChildren(
    tile("Accuracy", percent(value), note),
    tile("Tokens", compact(state.tokens), "read and written"),
    tile("Speed", compact(last?.["time.tokens_per_second"] ?? NaN), `tokens a second${state.newest ? `, ${state.newest.name}` : ""}`),
    tile("Time", duration(state.seconds), state.done ? "in all" : "so far"),
    tile("Cost", dollars(state.dollars), `at ${dollars(run?.dollars_per_hour)} an hour`));
}

function drawEvals() {
  const rows = [...page.state.evals.values()], section = byId("evals");
  section.hidden = !rows.length;
  section.replaceChildren(h("h2", {}, "Evaluations"), h("div", { class: "scroll" }, h("table", {},
    h("thead", {}, h("tr", {}, ["Checkpoint", "Accuracy", "95 % interval", "", "Problems", "Thinking", "MTP acceptance"].map((word) => h("th", {}, word)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, h("th", { scope: "row", title: row.checkpoint }, row.name ?? row.checkpoint), h("td", {}, h("b", {}, percent(row.accuracy))),
      h("td", {}, `${number(100 * row.low, 1)} – ${percent(row.high)}`), h("td", { class: "interval" }, interval(row)), h("td", {}, number(row.n)),
      h("td", {}, Number.isFinite(row.thinking_length) ? `${number(row.thinking_length)} tokens` : "–"), h("td", {}, percent(row.mtp_acceptance))))))));
}

const interval = ({ low, high, accuracy }) => h("div", { class: "whisker", "aria-hidden": "true" },
  h("i", { style: `left:${100 * low}%;width:${100 * (high - low)}%` }), h("b", { style: `left:${100 * accuracy}%` }));

function drawCharts() {
  const place = byId("charts");
  for (const stage of page.state.stages.values()) {
    if (!stage.steps.length) continue;
    if (!page.charts.has(stage.name)) { // the newest stage comes first
      const group = { charts: [] };
      const onHover = (step) => group.charts.forEach((chart) => chart.showAt(step));
      group.charts = (CHARTS[stage.kind] ?? CHARTS.pretrain).map((spec) => new LineChart({ ...spec, onHover, lines: spec.lines.map(([key, label, color]) => ({ key, label, color })) }));
      page.charts.set(stage.name, group);
      const title = TITLES[stage.kind] ?? stage.name;
      place.prepend(h("section", { "aria-label": title }, h("h2", { class: "section" }, title), h("div", { class: "charts" }, group.charts.map((chart) => chart.element))));
      place.querySelector("h2").append(smoothingSlider(place));
    }
    for (const chart of page.charts.get(stage.name).charts) {
      chart.set(Object.fromEntries(chart.lines.map(({ key }) => [key, series(stage, key)])), page.smoothing);
    }
  }
}

function smoothingSlider(place) {
  place.querySelector(".smoothing")?.remove();
  const input = h("input", { type: "range", min: 0, max: 0.95, step: 0.05, value: page.smoothing });
  input.addEventListener("input", () => { page.smoothing = Number(input.value); drawCharts(); });
  return h("label", { class: "smoothing" }, "Smoothing", input);
}

function scaled(value, unit) { // 1.55 M, 12.3 GB
  if (!Number.isFinite(value)) return "–";
  const power = value < 1000 ? 0 : Math.min(5, Math.floor(Math.log10(value) / 3));
  return `${Number((value / 1000 ** power).toPrecision(3))} ${["", "k", "M", "G", "T", "P"][power]}${unit}`.trim();
}
const FORMS = { s: duration, $: dollars, "%": (value) => percent(value), "": (value) => scaled(value, ""), FLOP: (value) => scaled(value, "FLOP"), B: (value) => scaled(value, "B"), J: (value) => scaled(value, "J") };

function drawCosts() {
  const stages = [...page.state.stages.values()].filter((stage) => stage.plan && stage.last), section = byId("costs");
  section.hidden = !stages.length;
  const row = ([what, unit, planned, measured]) => h("tr", {}, h("th", { scope: "row" }, what), h("td", {}, FORMS[unit](planned)), h("td", {}, FORMS[unit](measured)),
    h("td", { class: "soft" }, Number.isFinite(measured / planned) ? Number((measured / planned).toPrecision(3)).toString() : ""));
  section.replaceChildren(h("h2", {}, "Plan against measured"), h("p", { class: "hint" }, "The plan counts every answer as long as its limit, and takes this machine's own matrix products at the utilisation that V3's report reached. The rest of memory is the program itself."),
    h("div", { class: "costs" }, stages.map((stage) => h("div", { class: "scroll" }, h("h3", {}, stage.name), h("table", {},
      h("thead", {}, h("tr", {}, ["", "plan", "measured", "ratio"].map((word) => h("th", {}, word)))), h("tbody", {}, againstPlan(stage).map(row)))))));
}

function drawExperts() {
  const stage = [...page.state.stages.values()].filter((one) => one.last?.expert_load?.length).pop(), section = byId("experts");
  section.hidden = !stage;
  if (!stage) return;
  const rows = stage.last.expert_load;
  const cells = rows.map((row, layer) => {
    const name = layer === rows.length - 1 && Number.isFinite(stage.last.mtp_loss) ? "MTP" : `MoE ${layer + 1}`;
    return [h("span", { class: "layer" }, name), h("div", { class: "cells" }, row.map((part, expert) => {
      const times = part * row.length, strength = Math.min(1, Math.abs(Math.log2(Math.max(times, 1e-3))) / 2);
      return h("i", { style: `background:color-mix(in oklab, var(--${times > 1 ? "hot" : "cold"}) ${Math.round(100 * strength)}%, var(--sunken))`, title: `${name}, expert ${expert}: ${percent(part)}, ${times.toFixed(2)} x the even share` });
    }))];
  });
  const most = Math.max(...rows.map((row) => Math.max(...row) * row.length));
  section.replaceChildren(h("h2", {}, "Expert load"), h("p", { class: "hint" }, `Share of tokens per expert at step ${stage.last.step} of ${stage.name}; ${rows[0].length} experts a layer. Busiest: ${number(most, 2)} times the even share.`),
    h("div", { class: "heat", role: "img", "aria-label": `Expert load, busiest ${number(most, 2)} times the even share` }, cells),
    h("div", { class: "heat-scale" }, "¼ ×", h("i", { "aria-hidden": "true" }), "4 × the even share"));
}

function drawSamples() {
  const { samples } = page.state, section = byId("samples");
  section.hidden = !samples;
  if (!samples || section.dataset.step === `${samples.stage} ${samples.step}`) return;
  if (section.dataset.step && section.matches(":hover, :focus-within")) return; // somebody is reading
  section.dataset.step = `${samples.stage} ${samples.step}`;
  section.replaceChildren(h("h2", {}, "Newest thoughts"), h("p", { class: "hint" }, `Sampled in ${samples.stage}, step ${samples.step}.`),
    ...samples.samples.map(({ prompt, thought, answer, correct }) => h("details", { class: "sample" },
      h("summary", {}, badge(correct), h("span", { class: "prompt" }, prompt), h("code", {}, answer), icon("down")),
      h("pre", {}, thought))));
  section.querySelector("details").open = true;
}

const badge = (correct) => h("span", { class: `badge ${correct ? "right" : "wrong"}` }, correct ? "✓ right" : "✗ wrong");

byId("tools").append(themeButton());
poll();
