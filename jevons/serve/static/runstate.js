// Everything the live page knows, gathered from the lines of metrics.jsonl and nothing else.

export class RunState {
  constructor() {
    this.run = null;
    this.stages = new Map(); // name -> {name, kind, budget, unit, status, steps: [line], last}
    this.evals = new Map(); // checkpoint -> line
    this.samples = null;
    this.done = null;
    this.notes = []; // of the run: what a person should know
    this.lines = 0;
    this.lastUnix = null;
  }

  stage(name) {
    if (!this.stages.has(name)) this.stages.set(name, { name, kind: name, budget: null, unit: "steps", status: "waiting", steps: [], last: null, plan: null, held: null, bad: [], flops: 0, peak: NaN, evaluated: 0, seconds: 0, dollars: 0 });
    return this.stages.get(name);
  }

  add(line) {
    this.lines += 1;
    if (line["time.unix"]) this.lastUnix = line["time.unix"];
    if (line.kind === "run") this.addRun(line);
    else if (line.kind === "done") this.done = line;
    else if (line.kind === "samples") this.samples = line;
    else if (line.kind === "eval") this.evals.set(`${line.checkpoint} ${line.name}`, line);
    if (line.kind !== "done") this.done = this.done && line.kind === "run" ? null : this.done; // a resumed run goes on
    const named = line.stage && line.kind !== "run" && line.kind !== "done" ? this.stage(line.stage) : null;
    if (!named) return;
    if (line.kind === "stage") named.status = line.event === "end" ? "done" : "running";
    else if (named.status === "waiting") named.status = "running";
    if (line.kind === "note") this.notes.push(`${line.stage}: ${line.text}`);
    if (line.kind === "plan") named.plan = line;
    if (line.kind === "memory") named.held = line;
    if (line.kind === "bad_batch") named.bad.push(line);
    if (line.kind === "rollback") { // what came after the good state counts no more, but was paid for
      named.steps = named.steps.filter((step) => step.step <= line.to_step);
      this.notes.push(`${line.stage}: at step ${line.step} back to step ${line.to_step}, and on past the data of steps ${line.data_from} to ${line.data_to}`);
    }
    if (line.kind === "step") {
      named.flops += line.flops ?? 0;
      named.peak = Math.max(named.peak || 0, line["time.peak_bytes"] ?? NaN);
      named.steps.push(line);
      named.last = line;
      named.seconds = line["time.seconds"] ?? named.seconds; // counted from the stage's beginning
      named.dollars = line["time.dollars"] ?? named.dollars;
    }
    if (line.kind === "eval") { // each has its own
      named.evaluated += 1;
      named.seconds += line["time.seconds"] ?? 0;
      named.dollars += line["time.dollars"] ?? 0;
    }
  }

  addRun(line) {
    this.run = line;
    for (const { name, kind, budget, unit } of line.stages ?? []) Object.assign(this.stage(name), { kind, budget, unit });
  }

  get current() {
    return [...this.stages.values()].find((stage) => stage.status === "running") ?? null;
  }

  /** The last stage that logged steps. */
  get newest() {
    return [...this.stages.values()].filter((stage) => stage.last).pop() ?? null;
  }

  sum(value) {
    return [...this.stages.values()].reduce((sum, stage) => sum + (value(stage) || 0), 0);
  }

  get tokens() {
    return this.sum((stage) => stage.last?.tokens);
  }

  /** Dollars as logged, all stages together. */
  get dollars() {
    return this.done?.["time.dollars"] ?? this.sum((stage) => stage.dollars);
  }

  get seconds() {
    return this.done?.["time.seconds"] ?? this.sum((stage) => stage.seconds);
  }

  /** {share done, seconds left} of a stage; the pace is that of its last 20 steps. */
  progress(stage) {
    const at = (stage.unit === "tokens" ? stage.last?.tokens : stage.last?.step) ?? 0;
    const share = stage.status === "done" ? 1 : stage.budget ? Math.min(1, at / stage.budget) : 0;
    const { steps } = stage, a = steps[Math.max(0, steps.length - 20)], b = stage.last;
    let left = NaN;
    if (stage.status === "running" && a && b && a !== b && stage.budget) {
      const amount = (line) => (stage.unit === "tokens" ? line.tokens : line.step);
      left = ((stage.budget - at) * (b["time.seconds"] - a["time.seconds"])) / Math.max(1, amount(b) - amount(a));
    }
    return { at, share, left };
  }

  /** The accuracy to show now: of GRPO's last ten steps while it runs, otherwise of the newest evaluation. */
  get accuracy() {
    const evaluated = [...this.evals.values()].pop(), { newest } = this;
    const rates = (newest?.steps ?? []).map((step) => step.accuracy).filter(Number.isFinite).slice(-10);
    if (evaluated && (!rates.length || this.current?.kind === "eval" || !this.current)) {
      return { value: evaluated.accuracy, note: `${evaluated.name ?? evaluated.checkpoint}, greedy, ${evaluated.n} held-out problems` };
    }
    if (rates.length) return { value: rates.reduce((a, b) => a + b) / rates.length, note: "of sampled answers, last 10 steps" };
    return { value: NaN, note: "known once the model answers" };
  }
}

/** Rows [what, unit, planned, measured] of a stage that has a plan and a step; the report has the same. */
export function againstPlan({ plan, held, last, flops, peak }) {
  const memory = plan.memory ?? {}, seconds = last["time.seconds"], parts = ["weights", "gradients", "optimizer"];
  const rest = held ? peak - parts.reduce((sum, key) => sum + held[key], 0) : NaN;
  return [
    ["tokens", "", plan.tokens, last.tokens],
    ["model FLOPs", "FLOP", plan.flops, flops || NaN],
    ["utilisation", "%", plan.utilisation, flops / seconds / plan["time.peak_flops"] || NaN],
    ["tokens a second", "", plan.tokens / plan["time.planned_seconds"], last.tokens / seconds],
    ["time", "s", plan["time.planned_seconds"], seconds],
    ["dollars", "$", plan["time.planned_dollars"], last["time.dollars"]],
    ...parts.map((key) => [key, "B", memory[key], held?.[key]]),
    ["activations and the rest", "B", memory.activations, rest],
    ["memory in all", "B", Object.values(memory).reduce((sum, size) => sum + size, 0) || NaN, peak],
    ...(Number.isFinite(last["time.joules"]) ? [["energy", "J", NaN, last["time.joules"]]] : []),
  ];
}

/** Points [step, value] of one key, leaving out what was not a number. */
export const series = (stage, key) => stage.steps.map((line) => [line.step, line[key]]).filter(([x, y]) => Number.isFinite(x) && Number.isFinite(y));
