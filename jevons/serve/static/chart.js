// A line chart in SVG: axes, several series, smoothing, the values under the pointer in the legend.

import { h, s } from "./dom.js";

const HEIGHT = 190, LEFT = 54, RIGHT = 10, TOP = 10, BOTTOM = 24;

/** Round ticks inside [low, high], about `count` of them, at least `least` apart. */
export function ticks(low, high, count, least = 0) {
  const span = high - low || 1, rough = span / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(least, power * ([1, 2, 2.5, 5, 10].find((m) => m * power >= 0.8 * rough) ?? 10)), found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}

/** Exponential moving average without the bias towards its start; `amount` in [0, 1). */
export function smooth(points, amount) {
  let mean = 0, weight = 0;
  return points.map(([x, y]) => {
    mean = amount * mean + (1 - amount) * y;
    weight = amount * weight + (1 - amount);
    return [x, mean / weight];
  });
}

/** At most about `most` points: means of neighbours. */
export function thin(points, most) {
  const width = Math.ceil(points.length / most);
  if (width <= 1) return points;
  const thinned = [];
  for (let i = 0; i < points.length; i += width) {
    const part = points.slice(i, i + width);
    thinned.push([part.at(-1)[0], part.reduce((sum, [, y]) => sum + y, 0) / part.length]);
  }
  return thinned;
}

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle + 1;
    else high = middle;
  }
  return low > 0 && x - points[low - 1][0] < points[low][0] - x ? points[low - 1] : points[low];
}

export class LineChart {
  /** `lines`: [{key, label, color}], `format(value)`, optional `low` and `high` that the value axis at least has, `onHover(step|null)`. */
  constructor({ title, note = "", lines, format, low, high, onHover = () => {} }) {
    Object.assign(this, { title, lines, format, low, high, data: {}, smoothing: 0, at: null });
    this.values = lines.map(({ label, color }) => {
      const value = h("b", {});
      return { value, label: h("span", { class: "key" }, h("i", { style: `background:${color}` }), label, value) };
    });
    this.where = h("span", { class: "where" });
    this.svg = s("svg", { class: "plot", height: HEIGHT, role: "img" });
    this.element = h("figure", { class: "card chart" }, h("figcaption", {}, h("h3", { title: note }, title), this.where),
      h("div", { class: "legend" }, this.values.map(({ label }) => label)), this.svg);
    this.svg.addEventListener("pointermove", (event) => onHover(this.stepAt(event.clientX - this.svg.getBoundingClientRect().left)));
    this.svg.addEventListener("pointerleave", () => onHover(null));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  set(data, smoothing) {
    this.data = data;
    this.smoothing = smoothing;
    this.element.hidden = !Object.values(data).some((points) => points.length);
    this.draw();
  }

  /** Show the values at a step, or the last ones (null). */
  showAt(step) {
    this.at = step;
    this.drawValues();
  }

  stepAt(pixel) {
    return this.scale ? this.scale.x0 + ((pixel - LEFT) / this.scale.width) * (this.scale.x1 - this.scale.x0) : null;
  }

  draw() {
    const width = this.svg.clientWidth - LEFT - RIGHT, height = HEIGHT - TOP - BOTTOM;
    const shown = this.lines.map(({ key }) => this.data[key] ?? []), all = shown.flat();
    if (width < 40 || !all.length) return;
    this.curves = shown.map((points) => (this.smoothing ? smooth(points, this.smoothing) : points));
    const scale = this.scale = { ...this.domain(all), width };
    scale.x = (x) => LEFT + ((x - scale.x0) / (scale.x1 - scale.x0 || 1)) * width;
    scale.y = (y) => TOP + (1 - (Math.min(scale.y1, Math.max(scale.y0, y)) - scale.y0) / (scale.y1 - scale.y0 || 1)) * height;
    const path = (points) => `M${thin(points, width).map(([x, y]) => `${scale.x(x).toFixed(1)},${scale.y(y).toFixed(1)}`).join("L")}`;
    const parts = ticks(scale.y0, scale.y1, 4).map((y) => s("g", { class: "tick" }, s("line", { x1: LEFT, x2: LEFT + width, y1: scale.y(y), y2: scale.y(y) }),
      s("text", { x: LEFT - 8, y: scale.y(y) + 4, "text-anchor": "end" }, this.format(y))));
    parts.push(...ticks(scale.x0, scale.x1, Math.max(2, Math.floor(width / 62)), 1).map((x) => s("text", { class: "step", x: scale.x(x), y: HEIGHT - 6, "text-anchor": "middle" }, x.toLocaleString("en"))));
    this.lines.forEach(({ color }, i) => {
      if (this.smoothing && shown[i].length > 1) parts.push(s("path", { class: "raw", d: path(shown[i]), stroke: color }));
      if (shown[i].length > 1) parts.push(s("path", { class: "curve", d: path(this.curves[i]), stroke: color }));
      else if (shown[i].length) parts.push(s("circle", { cx: scale.x(shown[i][0][0]), cy: scale.y(shown[i][0][1]), r: 3, fill: color }));
    });
    this.cursor = s("g", {});
    this.svg.replaceChildren(...parts, this.cursor);
    this.drawValues();
  }

  domain(all) {
    let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
    for (const [x, y] of all) {
      x0 = Math.min(x0, x), x1 = Math.max(x1, x), y0 = Math.min(y0, y), y1 = Math.max(y1, y);
    }
    if (y0 === y1) [y0, y1] = y0 < 0 ? [2 * y0, 0] : [0, 2 * y1 || 1];
    const room = (y1 - y0) * 0.06;
    const bottom = y0 >= 0 && y0 < 0.45 * y1 ? 0 : y0 - room;
    return { x0, x1: x1 > x0 ? x1 : x0 + 1, y0: Math.min(this.low ?? bottom, bottom), y1: this.high >= y1 ? this.high : y1 + room };
  }

  drawValues() {
    if (!this.scale) return;
    const marks = [], { scale } = this;
    let step = null;
    this.lines.forEach(({ color }, i) => {
      const points = this.curves[i];
      if (!points.length) return void (this.values[i].value.textContent = "–");
      const [x, y] = this.at === null ? points.at(-1) : nearest(points, this.at);
      this.values[i].value.textContent = this.format(y, true);
      step = Math.max(step ?? x, x);
      if (this.at !== null) marks.push(s("circle", { cx: scale.x(x), cy: scale.y(y), r: 3.5, fill: color }));
    });
    this.where.textContent = step === null ? "" : `step ${step.toLocaleString("en")}`;
    if (this.at !== null && step !== null) marks.unshift(s("line", { class: "cursor", x1: scale.x(step), x2: scale.x(step), y1: TOP, y2: HEIGHT - BOTTOM }));
    this.cursor.replaceChildren(...marks);
    const words = this.lines.map(({ label }, i) => `${label} ${this.values[i].value.textContent}`).join(", ");
    this.svg.setAttribute("aria-label", `${this.title}: ${words}${step === null ? "" : ` at step ${step}`}`);
  }
}
