// Markdown that grows: the server renders it, and only the unfinished block is sent again, at most four times a second.

import { copyButton } from "./dom.js";

const INTERVAL = 250, LARGEST = 20_000;
const cache = new Map(); // text -> html of finished pieces, for threads that are drawn again

async function renderText(text, keep) {
  if (cache.has(text)) return cache.get(text);
  const response = await fetch("/ui/render", { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ text }) });
  if (!response.ok) throw new Error(`render: ${response.status}`);
  const { html } = await response.json();
  if (keep) cache.set(text, html);
  if (cache.size > 400) cache.delete(cache.keys().next().value);
  return html;
}

/** Where the last block of `text` after `from` begins: what lies before will not change any more. */
export function lastBlock(text, from) {
  let fence = "", math = false, blank = false, cut = from, at = from;
  for (const line of text.slice(from).split("\n")) {
    const bare = line.trim(), mark = /^(`{3,}|~{3,})/.exec(bare)?.[1];
    const continues = /^(\s|[-*+>|]|\d+[.)])/.test(line); // it may belong to a list, a quote or a table above
    if (blank && bare && !fence && !math && !continues) cut = at;
    if (fence) fence = mark && mark.startsWith(fence) && bare === mark ? "" : fence;
    else if (mark) fence = mark;
    else if ((bare.match(/\$\$/g) ?? []).length % 2) math = !math;
    else if (bare.startsWith("\\[")) math = !bare.includes("\\]");
    else if (math && bare.endsWith("\\]")) math = false;
    blank = !bare;
    at += line.length + 1;
  }
  return Math.max(cut, text.length - LARGEST);
}

export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.live = Object.assign(document.createElement("div"), { className: "live" });
    this.element.replaceChildren(this.live);
    this.text = "";
    this.start = 0; // text before it stands in finished HTML
    this.shown = null; // the unfinished text that `live` shows
    this.complete = false;
    this.busy = null;
  }

  update(text) {
    this.text = text;
    this.busy ??= this.pump();
  }

  /** The whole text is here; resolves when all of it is drawn. */
  async finish(text) {
    this.text = text;
    this.complete = true;
    this.wake?.();
    await (this.busy ??= this.pump());
  }

  async pump() {
    await null; // so that `busy` is set before it is cleared
    while (this.start < this.text.length && (this.complete || this.shown !== this.text.slice(this.start))) {
      const cut = lastBlock(this.text, this.start);
      const ends = cut > this.start || this.complete; // is this piece finished?
      const piece = this.text.slice(this.start, cut > this.start ? cut : undefined).slice(0, LARGEST);
      const began = Date.now();
      const place = ends ? document.createElement("div") : this.live;
      try {
        place.innerHTML = await renderText(piece, ends);
      } catch { // the server is away: the plain text is better than nothing
        place.replaceChildren(Object.assign(document.createElement("p"), { className: "plain", textContent: piece }));
      }
      if (ends) {
        this.start += piece.length;
        for (const block of place.querySelectorAll(".code-block")) block.append(copyButton("Copy the code", () => block.querySelector("code").textContent));
        this.live.before(...place.childNodes);
        this.live.replaceChildren();
        this.shown = null;
      } else {
        this.shown = piece;
      }
      if (!this.complete) {
        await new Promise((next) => {
          this.wake = next;
          setTimeout(next, INTERVAL - (Date.now() - began));
        });
      }
    }
    this.busy = null;
  }
}
