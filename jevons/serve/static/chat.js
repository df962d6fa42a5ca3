// The chat page: conversations at the left, the thread, the question box. One answer streams at a time.

import { byId, h, icon, iconButton, themeButton } from "./dom.js";
import { answerNow, ask, AnswerError } from "./stream.js";
import * as talk from "./conversations.js";
import { AnswerTurn, userTurn } from "./turn.js";

const DEFAULTS = { temperature: 0.6, maxTokens: null, maxThinking: null, votes: 1, remember: false, key: "" };
const page = {
  info: null, // of /ui/info, null while the server is away
  conversations: talk.loadAll(),
  current: talk.create(),
  running: null, // {conversation, node, view, controller, began, id}
  settings: { ...DEFAULTS },
};
const log = byId("log"), thread = byId("thread"), question = byId("question"), send = byId("send");

// ---- settings

function loadSettings() {
  try { Object.assign(page.settings, JSON.parse(localStorage.getItem("jevons.settings") ?? "{}")); } catch { /* defaults */ }
  drawSettings();
}

function drawSettings() {
  const { temperature, maxTokens, maxThinking, votes, remember, key } = page.settings;
  byId("temperature").value = temperature;
  byId("temperature-value").textContent = Number(temperature).toFixed(2);
  byId("max-tokens").value = maxTokens ?? "";
  byId("max-thinking").value = maxThinking ?? "";
  byId("votes").value = votes;
  byId("remember").checked = remember;
  byId("key").value = key;
}

function setSetting(name, value) {
  page.settings[name] = value;
  try { localStorage.setItem("jevons.settings", JSON.stringify(page.settings)); } catch { /* for this visit only */ }
  drawSettings();
}

function setUpSettings(button) {
  const panel = byId("settings");
  const toggle = (open) => {
    panel.hidden = !open;
    button.setAttribute("aria-expanded", String(open));
    if (open) byId("temperature").focus();
  };
  button.addEventListener("click", (event) => { event.stopPropagation(); toggle(panel.hidden); });
  document.addEventListener("click", (event) => { if (!panel.hidden && !panel.contains(event.target)) toggle(false); });
  panel.addEventListener("keydown", (event) => { if (event.key === "Escape") { toggle(false); button.focus(); } });
  byId("temperature").addEventListener("input", (event) => setSetting("temperature", Number(event.target.value)));
  const limit = (id, name, least) => byId(id).addEventListener("change", (event) => {
    const value = Math.floor(Number(event.target.value));
    setSetting(name, event.target.value.trim() && value >= least ? value : null);
  });
  limit("max-tokens", "maxTokens", 1);
  limit("max-thinking", "maxThinking", 0);
  byId("votes").addEventListener("change", (event) => setSetting("votes", Number(event.target.value)));
  byId("remember").addEventListener("change", (event) => setSetting("remember", event.target.checked));
  byId("key").addEventListener("change", (event) => setSetting("key", event.target.value.trim()));
  byId("reset-settings").addEventListener("click", () => { Object.assign(page.settings, DEFAULTS); setSetting("remember", DEFAULTS.remember); });
}

// ---- the server's state

async function pollInfo() {
  try {
    const response = await fetch("/ui/info");
    if (!response.ok) throw new Error(String(response.status));
    const info = await response.json();
    const changed = JSON.stringify(info) !== JSON.stringify(page.info);
    page.info = info;
    if (changed) drawState();
  } catch {
    if (page.info !== null || byId("banner").hidden) { page.info = null; drawState(); }
  }
  setTimeout(pollInfo, document.hidden ? 15_000 : page.info?.training || !page.info ? 2_000 : 6_000);
}

function drawState() {
  const { info } = page, state = byId("state"), banner = byId("banner");
  banner.hidden = Boolean(info?.model);
  banner.classList.toggle("down", !info);
  banner.textContent = info ? `No model answers yet${info.training ? `; training is at ${info.training}` : ""}. This page notices when there is one.` : "The server does not answer. Looking for it again…";
  state.hidden = !info;
  state.classList.toggle("busy", Boolean(info?.training));
  state.replaceChildren(h("i", { "aria-hidden": "true" }), h("span", {}, info?.training ? `Training: ${info.training}` : info?.model ?? "no model"));
  drawSend();
  if (!talk.path(page.current).length) drawThread();
}

function waitingWords({ answered, votes } = {}) {
  if (page.info?.training) return `Training holds the weights; your question is answered at the next step (${page.info.training}).`;
  return votes > 1 ? `Asking ${votes} times; ${answered || "none"} ${answered === 1 ? "has" : "have"} answered so far` : "Waiting for the model…";
}

// ---- asking

function begin(conversation, parent) {
  if (page.running) return;
  const asked = conversation.nodes[parent];
  const node = talk.add(conversation, parent, { role: "assistant", content: "", thought: "", status: "running", meta: {} });
  const controller = new AbortController();
  const messages = talk.messagesFor(conversation, asked, page.settings.remember);
  page.running = { conversation, node, controller, began: performance.now(), view: null, id: null, votes: page.settings.votes, answered: 0 };
  keep(conversation);
  drawThread();
  drawSend();
  follow(true);
  stream(page.running, messages);
}

function requestBody(messages) {
  const { temperature, maxTokens, maxThinking, votes } = page.settings;
  const body = { model: page.info?.model ?? "jevons", messages, stream: true, temperature: Number(temperature) };
  if (maxTokens) body.max_tokens = maxTokens;
  if (maxThinking !== null) body.max_thinking_tokens = maxThinking;
  if (votes > 1) body.votes = votes;
  return body;
}

async function stream(run, messages) {
  const { node, view, controller, began } = run, { meta } = node;
  const since = () => (performance.now() - began) / 1000;
  const ticker = setInterval(() => view.tick(since() - (meta.firstAt ?? 0), waitingWords(run)), 100);
  try {
    for await (const event of ask(requestBody(messages), page.settings.key, controller.signal)) {
      if (event.id) {
        run.id = event.id;
        view.offerAnswer(run.votes > 1);
      }
      run.answered = event.answered ?? run.answered;
      const thought = event.delta?.reasoning_content, text = event.delta?.content;
      if (thought || text) {
        meta.firstAt ??= since();
        meta.lastAt = since();
      }
      if (thought) view.addThought(thought);
      if (text) {
        meta.thinkingSeconds ??= since() - meta.firstAt;
        view.addText(text);
      }
      if (event.finish) meta.finish = event.finish;
      if (event.votes) meta.votes = { ...event.votes, tally: event.votes.tally.map((vote) => ({ ...vote, answer: vote.answer.slice(0, 300) })) };
      if (event.usage) meta.usage = event.usage;
      follow();
    }
    node.status = "done";
  } catch (error) {
    node.status = error.name === "AbortError" ? "stopped" : "error";
    if (node.status === "error") Object.assign(meta, { error: error instanceof AnswerError ? error.message : `The page could not read the answer: ${error.message}`, retryAfter: error.retryAfter ?? null });
  } finally {
    clearInterval(ticker);
    meta.seconds = since();
    meta.thinkingSeconds ??= node.thought ? (meta.lastAt ?? 0) - (meta.firstAt ?? 0) : null;
    meta.streaming = (meta.lastAt ?? 0) - (meta.firstAt ?? 0);
    meta.dollarsPerHour = page.info?.dollars_per_hour;
    page.running = null;
    keep(run.conversation);
    drawSend();
    byId("announce").textContent = { done: "The answer is complete.", stopped: "Stopped.", error: "The answer failed." }[node.status];
    await view.end();
    follow();
  }
}

const stop = () => page.running?.controller.abort();

function submit(text) {
  text = text.trim();
  if (!text || page.running || !page.info?.model) return;
  const parent = talk.path(page.current).at(-1)?.id ?? "root";
  askUnder(parent, text);
}

function askUnder(parent, text) {
  if (page.running) return;
  const node = talk.add(page.current, parent, { role: "user", content: text });
  begin(page.current, node.id);
}

// ---- drawing

function keep(conversation) {
  if (conversation.removed) return;
  if (!page.conversations.includes(conversation)) page.conversations.unshift(conversation);
  talk.save(conversation);
  page.conversations.sort((a, b) => b.updated - a.updated);
  history.replaceState(null, "", `#${page.current.id}`);
  drawConversations();
}

function drawThread() {
  const conversation = page.current, nodes = talk.path(conversation);
  document.title = conversation.title ? `${conversation.title} · Jevons` : "Jevons";
  if (!nodes.length) return thread.replaceChildren(welcome());
  const show = (node) => (index) => { talk.show(conversation, node, index); keep(conversation); drawThread(); };
  thread.replaceChildren(...nodes.map((node) => {
    const place = talk.place(conversation, node);
    if (node.role === "user") return userTurn(node, place, { edit: (text) => askUnder(node.parent, text), show: show(node) });
    if (page.running?.node === node && page.running.view) return page.running.view.element;
    if (node.status === "running" && page.running?.node !== node) node.status = "stopped"; // the page was left while it ran
    const again = () => begin(conversation, node.parent);
    const now = () => answerNow(page.running.id, page.settings.key);
    const view = new AnswerTurn(node, place, { again, retry: again, now, show: show(node) });
    if (page.running?.node === node) page.running.view = view;
    return view.element;
  }));
}

function welcome() {
  const { info } = page;
  const examples = (info?.examples ?? []).slice(0, 6).map((text) => h("button", { type: "button", class: "example", disabled: !info.model, onclick: () => submit(text) }, h("span", {}, text), icon("send")));
  return h("div", { class: "welcome" }, h("img", { src: "/static/icon.svg", alt: "", width: 52, height: 52 }),
    h("h1", {}, "Ask, and watch it think"), h("p", { class: "taught" }, info?.taught ?? ""),
    examples.length ? h("div", { class: "examples", "aria-label": "Example questions" }, examples) : "");
}

function drawSend() {
  const running = Boolean(page.running);
  send.replaceChildren(running ? h("span", { class: "stop-mark" }) : icon("send"));
  send.classList.toggle("stop", running);
  send.setAttribute("aria-label", running ? "Stop" : "Send");
  send.title = running ? "Stop (Esc)" : "Send";
  send.disabled = !running && (!question.value.trim() || !page.info?.model);
}

function drawConversations() {
  const query = byId("search").value.trim();
  const found = query ? page.conversations.filter((one) => talk.matches(one, query)) : page.conversations;
  byId("conversations").replaceChildren(...found.map((one) => {
    const open = h("button", { type: "button", class: "open", "aria-current": one === page.current && "true", onclick: () => openConversation(one) }, one.title || "New chat");
    let sure = false;
    const bin = iconButton("trash", "Delete this conversation", () => {
      if (sure) return removeConversation(one);
      sure = true;
      bin.replaceChildren("Delete?");
      bin.classList.add("sure");
      setTimeout(() => { sure = false; bin.classList.remove("sure"); bin.replaceChildren(icon("trash")); }, 2500);
    });
    return h("div", { class: "conversation" }, open, bin);
  }), ...(found.length ? [] : [h("p", { class: "hint" }, query ? "Nothing found." : "Conversations will be listed here.")]));
}

function openConversation(conversation) {
  page.current = conversation;
  history.replaceState(null, "", conversation.title ? `#${conversation.id}` : "/");
  drawThread();
  drawConversations();
  drawer(false);
  log.scrollTop = log.scrollHeight;
  if (matchMedia("(hover: hover)").matches) question.focus();
}

function removeConversation(conversation) {
  conversation.removed = true;
  if (page.running?.conversation === conversation) stop();
  talk.remove(conversation.id);
  page.conversations = page.conversations.filter((one) => one !== conversation);
  if (conversation === page.current) openConversation(talk.create());
  else drawConversations();
}

let following = true; // the reader is at the end of the thread
function follow(always = false) {
  if (always) following = true;
  if (following) log.scrollTop = log.scrollHeight;
}

function drawer(open) {
  document.body.classList.toggle("drawer", open);
  byId("shade").hidden = !open;
}

function grow() {
  question.style.height = "auto";
  question.style.height = `${Math.min(question.scrollHeight, 220)}px`;
  drawSend();
}

// ---- events

function setUp() {
  byId("new-chat").append(icon("plus"), "New chat");
  byId("new-chat").addEventListener("click", () => openConversation(talk.create()));
  byId("menu-place").replaceWith(iconButton("menu", "Show conversations", () => drawer(!document.body.classList.contains("drawer")), { class: "icon-button menu" }));
  const settings = iconButton("sliders", "Settings", null, { "aria-expanded": "false", "aria-controls": "settings" });
  byId("tools").append(settings, themeButton());
  setUpSettings(settings);
  byId("shade").addEventListener("click", () => drawer(false));
  byId("search").addEventListener("input", drawConversations);
  log.addEventListener("scroll", () => { following = log.scrollHeight - log.scrollTop - log.clientHeight < 80; });
  question.addEventListener("input", grow);
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("composer").requestSubmit();
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (page.running) return event.submitter && stop(); // Enter while it writes does not stop it, the button does
    if (!page.info?.model) return;
    const text = question.value;
    question.value = "";
    grow();
    submit(text);
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") { if (document.body.classList.contains("drawer")) drawer(false); else stop(); } });
  addEventListener("storage", (event) => {
    if (!event.key?.startsWith("jevons.conversation.")) return;
    const open = [page.current, page.running?.conversation]; // these two are newer here than in storage
    page.conversations = talk.loadAll().map((one) => open.find((mine) => mine?.id === one.id) ?? one);
    drawConversations();
  });
}

setUp();
loadSettings();
page.current = page.conversations.find((one) => `#${one.id}` === location.hash) ?? page.current;
drawThread();
drawConversations();
drawSend();
pollInfo();
if (matchMedia("(hover: hover)").matches) question.focus();
