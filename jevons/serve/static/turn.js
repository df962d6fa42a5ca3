// How one question and one answer look. Views draw; chat.js decides.

import { compact, copyButton, dollars, duration, h, icon, iconButton, number, plural } from "./dom.js";
import { MarkdownView } from "./markdown.js";

function branches({ index, count }, onShow) {
  if (count < 2) return null;
  const step = (by, name, label) => iconButton(name, label, () => onShow(index + by), { disabled: index + by < 0 || index + by >= count });
  return h("span", { class: "branches" }, step(-1, "left", "Earlier version"), h("span", {}, `${index + 1} / ${count}`), step(1, "right", "Later version"));
}

/** A question, with its edit form. `on`: {edit(text), show(index)}. */
export function userTurn(node, place, on) {
  const turn = h("article", { class: "turn user", "aria-label": "Your question" });
  const draw = () => turn.replaceChildren(
    h("div", { class: "bubble" }, node.content),
    h("div", { class: "actions" }, branches(place, on.show), copyButton("Copy the question", () => node.content), iconButton("edit", "Edit and ask again", edit)),
  );
  const edit = () => {
    const area = h("textarea", { "aria-label": "Edit your question", rows: Math.min(8, node.content.split("\n").length) });
    area.value = node.content;
    const send = () => area.value.trim() && on.edit(area.value.trim());
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") draw();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    });
    const buttons = h("div", { class: "row end" }, h("button", { type: "button", class: "quiet", onclick: draw }, "Cancel"),
      h("button", { type: "button", class: "primary", onclick: send }, "Ask"));
    turn.replaceChildren(h("div", { class: "bubble editing" }, area, buttons));
    area.focus();
  };
  draw();
  return turn;
}

function usageParts(node) {
  const { usage, seconds, streaming, dollarsPerHour } = node.meta ?? {};
  if (!usage) return [];
  const { reasoning_tokens: thought = 0, accepted_prediction_tokens: accepted = 0, rejected_prediction_tokens: rejected = 0 } = usage.completion_tokens_details ?? {};
  const speed = usage.completion_tokens / Math.max((!node.meta.votes && streaming) || seconds, 1e-3); // a vote's winner comes all at once
  const cost = usage.cost ?? { seconds, dollars: seconds * dollarsPerHour / 3600 }; // other servers do not price an answer
  const cached = usage.prompt_cache_hit_tokens ?? 0;
  return [
    [`${compact(usage.prompt_tokens)} in${cached ? ` (${compact(cached)} cached)` : ""}`, "Tokens of the question as the model reads it"],
    [`${compact(thought)} thinking + ${compact(usage.completion_tokens - thought)} answer`, "Tokens the model wrote"],
    [`${compact(Math.round(speed))} tokens/s`, "Tokens written a second, first to last"],
    ...(accepted + rejected ? [[`${number(usage.completion_tokens / (usage.completion_tokens - accepted), 2)} tokens/pass`,
      `The model's own drafts: ${accepted} of ${accepted + rejected} were right`]] : []),
    [dollars(cost.dollars), `${duration(cost.seconds)} of this machine at its hourly rate`],
  ];
}

/** How the votes fell: each answer with its share, the winner's first. */
function tally({ asked, voted, tally: votes }) {
  const most = 6, rest = votes.slice(most).reduce((sum, vote) => sum + vote.count, 0), silent = asked - voted;
  const row = (answer, count, kind = "") => h("li", { class: kind, title: answer }, h("span", { class: "tally-answer" }, answer),
    h("span", { class: "bar", "aria-hidden": "true" }, h("i", { style: `width: ${100 * count / asked}%` })), h("span", { class: "count" }, `${count} of ${asked}`));
  return h("section", { class: "tally", "aria-label": "Votes" }, h("p", {}, `Asked ${asked} times, answered:`),
    h("ol", {}, votes.slice(0, most).map((vote, i) => row(vote.answer, vote.count, i ? "" : "winner")), rest ? row("other answers", rest, "rest") : "",
      silent ? row("no answer", silent, "rest") : ""));
}

const CLOSED = {
  asked: "You asked for the answer; the thought was closed there.",
  budget: "The thought reached its limit and was closed there.",
  loop: "The thought went in circles and was closed.",
};

/** An answer: the thought that opens and folds, the text, what went wrong, and the line below. */
export class AnswerTurn {
  /** `on`: {again(), show(index), retry(), now() -> whether the thought will be closed}. */
  constructor(node, place, on) {
    Object.assign(this, { node, place, on });
    this.touched = false; // the reader opened or folded the thought: leave it so
    this.label = h("span", { class: "label" });
    this.thoughtText = document.createTextNode(node.thought ?? "");
    this.thoughtBox = h("pre", { class: "thought-text", tabindex: 0, "aria-label": "Thought" }, this.thoughtText);
    const fold = h("button", { type: "button", class: "quiet fold", onclick: () => this.fold() }, icon("up"), "Fold the thought");
    this.thought = h("details", { class: "thought" },
      h("summary", { onclick: () => { this.touched = true; } }, h("span", { class: "spark", "aria-hidden": "true" }), this.label, icon("down")),
      h("div", { class: "thought-body" }, h("div", { class: "thought-copy" }, copyButton("Copy the thought", () => node.thought)), this.thoughtBox, h("div", { class: "thought-foot" }, fold)));
    this.now = h("button", { type: "button", class: "quiet", onclick: () => this.answerNow() }, icon("skip"), "Answer now");
    this.nowPlace = h("div", { class: "answer-now", hidden: true }, this.now);
    this.waiting = h("div", { class: "waiting", role: "status", hidden: true });
    this.text = h("div", { class: "markdown" });
    this.markdown = new MarkdownView(this.text);
    this.tally = h("div", {});
    this.notice = h("div", { class: "notice" });
    this.foot = h("footer", { class: "answer-foot" });
    this.element = h("article", { class: "turn assistant", "aria-label": "Answer" }, this.waiting, this.thought, this.nowPlace, this.text, this.tally, this.notice, this.foot);
    this.draw();
    if (node.status !== "running") this.markdown.finish(node.content);
  }

  fold() {
    this.touched = true;
    this.thought.open = false;
    this.thought.scrollIntoView({ block: "nearest" });
    this.thought.querySelector("summary").focus();
  }

  /** The server knows this answer: its thought can be closed, those of a vote before any is seen. */
  offerAnswer(voting) {
    Object.assign(this, { offered: true, voting });
    this.showNow();
  }

  showNow() {
    const { node } = this, reader = document.activeElement === this.now;
    this.nowPlace.hidden = node.status !== "running" || !this.offered || Boolean(node.content) || !(node.thought || this.voting);
    if (reader && this.nowPlace.hidden && node.thought) this.thought.querySelector("summary").focus();
  }

  async answerNow() {
    const say = (asked) => {
      this.now.ariaDisabled = String(asked); // not `disabled`, which would take the focus away
      this.now.lastChild.textContent = asked ? "Closing the thought…" : "Answer now";
    };
    if (this.now.ariaDisabled === "true") return;
    say(true);
    if (!await this.on.now().catch(() => false)) say(false);
  }

  /** The seconds that run while it waits or thinks, and why it waits. */
  tick(seconds, why) {
    const { node } = this;
    if (node.status !== "running") return;
    const waits = !node.thought && !node.content;
    this.waiting.hidden = !waits || seconds < 0.4;
    if (waits) this.waiting.replaceChildren(h("span", { class: "spark", "aria-hidden": "true" }), h("span", {}, why), h("span", { class: "seconds" }, duration(seconds)));
    if (node.thought && !node.content) this.label.textContent = `Thinking · ${duration(seconds)}`;
  }

  addThought(delta) {
    if (!this.node.thought && !this.touched) this.thought.open = true;
    this.node.thought += delta;
    const box = this.thoughtBox, follows = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    this.thoughtText.appendData(delta);
    this.thought.hidden = !this.node.thought;
    this.showNow();
    if (follows) box.scrollTop = box.scrollHeight;
  }

  addText(delta) {
    const first = !this.node.content;
    this.node.content += delta;
    this.markdown.update(this.node.content);
    if (first) this.endThought();
  }

  endThought() {
    this.waiting.hidden = true;
    if (!this.touched) this.thought.open = false;
    this.draw();
  }

  async end() {
    if (this.node.status === "done" || this.node.content) this.endThought();
    await this.markdown.finish(this.node.content);
    this.draw();
  }

  draw() {
    const { node } = this, { meta } = node, running = node.status === "running";
    this.thought.hidden = !node.thought;
    this.element.classList.toggle("running", running);
    this.thought.classList.toggle("thinking", running && !node.content);
    this.waiting.hidden = this.waiting.hidden || !running;
    this.showNow();
    this.tally.replaceChildren(meta.votes ? tally(meta.votes) : "");
    const tokens = meta.votes ? 0 : meta.usage?.completion_tokens_details?.reasoning_tokens;
    const ended = node.content || node.status === "done";
    this.label.textContent = `${ended ? "Thought" : "Thinking stopped"}${meta.votes ? " of the answer chosen" : ended && meta.thinkingSeconds ? ` for ${duration(meta.thinkingSeconds)}` : ""}${tokens ? ` · ${plural(tokens, "token")}` : ""}`;
    this.drawNotice();
    if (running) return this.foot.replaceChildren();
    const parts = usageParts(node).map(([text, title]) => h("span", { title }, text));
    this.foot.replaceChildren(
      h("div", { class: "actions" }, branches(this.place, this.on.show), node.content && copyButton("Copy the answer", () => node.content),
        node.status !== "error" && iconButton("retry", "Ask again", this.on.again)), // an error has its own button
      h("div", { class: "usage" }, parts));
  }

  drawNotice() {
    const { node } = this, { error, retryAfter, finish, usage, votes } = node.meta;
    const own = usage?.jevons?.answers?.[votes?.index] ?? usage?.jevons ?? {};
    let text = "", kind = "note";
    if (node.status === "error") [text, kind] = [error, "error"];
    else if (node.status === "stopped") text = "You stopped this answer.";
    else if (own.loop) text = "The answer went in circles and was ended.";
    else if (finish === "length") text = node.content ? "The answer reached the token limit." : "The thought reached the token limit before an answer. A higher limit in the settings may help.";
    else if (finish === "insufficient_system_resource") text = "The server ran short of resources and ended this answer.";
    else if (node.status === "done" && !node.content) text = "The model ended without an answer.";
    else text = CLOSED[own.thought_closed] ?? "";
    this.notice.hidden = !text;
    if (!text) return;
    const wait = retryAfter ? h("span", { class: "soft" }, `The server asks to wait ${number(retryAfter)} s.`) : null;
    const retry = kind === "error" && h("button", { type: "button", class: "quiet", onclick: this.on.retry }, icon("retry"), "Try again");
    this.notice.className = `notice ${kind}`;
    if (kind === "error") this.notice.setAttribute("role", "alert");
    this.notice.replaceChildren(h("span", {}, text), wait ?? "", retry || "");
  }
}
