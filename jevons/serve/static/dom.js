// Small helpers both pages use: elements, icons, copying, numbers, the theme button.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, props, children) {
  for (const [key, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "text") element.textContent = value;
    else if (value === true) element.setAttribute(key, "");
    else element.setAttribute(key, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** An HTML element: h("button", {class: "quiet", onclick: f}, "Copy"). */
export const h = (tag, props, ...children) => fill(document.createElement(tag), props, children);
/** An SVG element. */
export const s = (tag, props, ...children) => fill(document.createElementNS(SVG, tag), props, children);
export const byId = (id) => document.getElementById(id);

const ICONS = {
  plus: "M12 5v14M5 12h14", menu: "M4 7h16M4 12h16M4 17h10", close: "M6 6l12 12M18 6L6 18",
  send: "M12 19V6M6 11.5l6-6 6 6", copy: "M9 9h10v11H9zM5 15V4h10", check: "M5 12.5l4.5 4.5L19 7.5",
  retry: "M19 12a7 7 0 1 1-2.2-5.1M19 4v4h-4", edit: "M5 19l1-4L16.5 4.5l3 3L9 18zM14 7l3 3",
  left: "M14 6l-6 6 6 6", right: "M10 6l6 6-6 6", up: "M6 14l6-6 6 6", down: "M6 10l6 6 6-6",
  skip: "M5 6l8 6-8 6zM17 6v12", search: "M11 18a7 7 0 1 0 0-14 7 7 0 0 0 0 14zM16 16l5 5", trash: "M5 7h14M9 7V4h6v3M7 7l1 13h8l1-13",
  sliders: "M4 8h9M17 8h3M15 6v4M4 16h3M11 16h9M9 14v4",
  theme: "M12 3a9 9 0 1 0 0 18zM12 3a9 9 0 0 1 0 18", chart: "M4 19h16M6 15l4-5 4 3 5-7", chat: "M4 5h16v11H10l-5 4v-4H4z",
};

export function icon(name) {
  const props = { d: ICONS[name], fill: "none", stroke: "currentColor", "stroke-width": 1.8, "stroke-linecap": "round", "stroke-linejoin": "round" };
  return s("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" }, s("path", props));
}

/** A button that shows only an icon; `label` is what it is called. */
export const iconButton = (name, label, onclick, props = {}) =>
  h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...props }, icon(name));

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no clipboard outside of https and localhost
    const area = h("textarea", { class: "hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

/** A copy button that says so for a moment; `text` is asked at the click. */
export function copyButton(label, text, words = "") {
  const button = h("button", { type: "button", class: words ? "quiet" : "icon-button", "aria-label": label, title: label }, icon("copy"), words);
  button.addEventListener("click", async (event) => {
    event.preventDefault();
    await copyText(text());
    button.replaceChildren(icon("check"), words && "Copied");
    setTimeout(() => button.replaceChildren(icon("copy"), words), 1400);
  });
  return button;
}

export function themeButton() {
  return iconButton("theme", "Switch between dark and light", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("jevons.theme", root.dataset.theme); } catch { /* it holds for this visit */ }
  });
}

export const number = (value, digits = 0) =>
  Number.isFinite(value) ? value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits }) : "–";
export const percent = (value, digits = 1) => (Number.isFinite(value) ? `${number(100 * value, digits)} %` : "–");
export const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;

/** 950 → "950", 12_345 → "12.3 k", 3.2e6 → "3.20 M". */
export function compact(value) {
  if (!Number.isFinite(value)) return "–";
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= size) return `${(value / size).toPrecision(3)} ${unit}`;
  }
  return String(Math.round(value * 100) / 100);
}

/** Dollars with two digits that say something: $1.24, $0.013, $0.0000021. */
export function dollars(value) {
  if (!Number.isFinite(value)) return "–";
  if (value >= 1 || value === 0) return `$${value.toFixed(2)}`;
  const digits = Math.min(12, 1 - Math.floor(Math.log10(Math.abs(value))));
  return `$${value.toFixed(Math.max(2, digits))}`;
}

/** Seconds as "0.8 s", "42 s", "3 min 05 s", "2 h 10 min". */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds), minutes = Math.floor(whole / 60);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${minutes} min ${String(whole % 60).padStart(2, "0")} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
