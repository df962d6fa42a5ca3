"""A plan as one self-contained page: four plots as inline SVG and the tables. No script, light and dark."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from jevons.terminal.plan import Section, duration, money, short

STYLE = """
:root { color-scheme: light dark; --bg: light-dark(#faf9f6, #141618); --card: light-dark(#fff, #1b1e21);
  --line: light-dark(#e5e1d9, #2c3035); --text: light-dark(#1e2124, #e9e7e2); --soft: light-dark(#5e656c, #a3a9af);
  --c0: light-dark(#1f6f6b, #6cc5b9); --c1: light-dark(#b9721a, #e3ae62); --c2: light-dark(#6a5fb0, #a9a0ea);
  --c3: light-dark(#a8431f, #eb9a7c); --c4: light-dark(#2d6ca3, #62a4dc); --c5: light-dark(#8a8f26, #c9cf63);
  --c6: light-dark(#96527f, #dd9cc6); --c7: light-dark(#737980, #868d94) }
* { box-sizing: border-box }
body { margin: 0; background: var(--bg); color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 36px 20px 60px }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 } h2 { font-size: 1rem; margin: 0 0 10px } p { margin: 4px 0 0 }
.soft, figcaption, .note { color: var(--soft); font-size: .86rem }
.keys { display: flex; flex-wrap: wrap; gap: 10px 34px; margin: 20px 0 24px } .keys b { display: block; font-size: 1.3rem }
.flow { columns: 2 420px; column-gap: 14px; margin-bottom: 14px }
figure, .card { margin: 0 0 14px; background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 16px 18px;
  overflow-x: auto; break-inside: avoid }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { text-align: right; padding: 5px 0 5px 16px; border-top: 1px solid var(--line); font-weight: 400; white-space: nowrap }
th:first-child { text-align: left; padding-left: 0 } thead th { border: 0; color: var(--soft); font-size: .82rem }
svg { display: block; width: 100%; height: auto } svg text { fill: var(--text); font-size: 12px }
.axis { stroke: var(--line) } .limit { stroke: var(--soft) }
svg .tick { fill: var(--soft); font-size: 11px; paint-order: stroke; stroke: var(--card); stroke-width: 4px }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round }
"""
_W = 480


def _svg(height: float, body: list[str], label: str) -> str:
    return f'<svg viewBox="0 0 {_W} {height:g}" role="img" aria-label="{escape(label)}">{"".join(body)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def bars(rows: list[tuple[str, float, str]], limit: float = 0.0, limit_text: str = "") -> str:
    """One bar a row, from one zero; a dashed line at `limit`."""
    most, left, right = max(limit, *(v for _, v, _ in rows)) or 1.0, 138, 116
    scale, top = (_W - left - right) / most, 18 if limit else 2
    body = []
    for i, (name, value, text) in enumerate(rows):
        y = top + i * 27
        body += [_text(left - 10, y + 15, name, "end"), _text(left + value * scale + 7, y + 15, text, kind="tick"),
                 f'<rect x="{left}" y="{y}" width="{max(1.5, value * scale):.1f}" height="20" rx="3" fill="var(--c{i % 8})"/>']
    height = top + len(rows) * 27
    if limit:
        x = left + limit * scale
        body += [f'<path class="limit" d="M{x:.1f} {top - 4}V{height}" stroke-dasharray="4 3"/>',
                 _text(x, 11, limit_text, "end", "tick")]
    return _svg(height, body, ", ".join(f"{name} {text}" for name, _, text in rows))


def _tick(power: int) -> str:
    return f"{10.0**(power % 3):g}{' KMBT'[power // 3].strip()}" if 0 <= power < 15 else f"1e{power}"


def _curves(lines: list[tuple[str, list[tuple[float, float]]]]) -> str:
    """Lines on two logarithmic axes, a legend under them."""
    xs, ys = ([p[k] for _, points in lines for p in points] for k in (0, 1))
    x1, y0, y1 = max(1, math.ceil(math.log10(max(xs)))), math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    left, top, width, height = 40, 8, _W - 60, 220

    def at(x: float, y: float) -> tuple[float, float]:
        return left + math.log10(x) / x1 * width, top + height - (math.log10(y) - y0) / max(1, y1 - y0) * height

    body = []
    for k in range(x1 + 1):
        x, foot = at(10**k, 10**y0)
        body += [f'<path class="axis" d="M{x:.1f} {top}V{foot:.1f}"/>', _text(x, foot + 15, _tick(k), "middle", "tick")]
    for k in range(y0, y1 + 1):
        y = at(1, 10**k)[1]
        body += [f'<path class="axis" d="M{left} {y:.1f}H{left + width}"/>', _text(left - 6, y + 4, _tick(k), "end", "tick")]
    for i, (name, points) in enumerate(lines):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*p) for p in points))
        x, y = at(*points[-1])
        lx, ly, colour = left + i % 2 * 200, top + height + 40 + i // 2 * 19, f"var(--c{i % 8})"
        body += [f'<polyline points="{path}" stroke="{colour}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>',
                 f'<rect x="{lx}" y="{ly - 9}" width="11" height="9" rx="2" fill="{colour}"/>',
                 _text(lx + 17, ly, name, kind="tick")]
    return _svg(top + height + 32 + -(-len(lines) // 2) * 19, body, "tokens a second against users at once")


def figure(title: str, plot: str, caption: str) -> str:
    return f"<figure><h2>{escape(title)}</h2>{plot}<figcaption>{escape(caption)}</figcaption></figure>"


def table(part: Section) -> str:
    def row(cells: list[str], tags: tuple[str, str]) -> str:
        return "<tr>" + "".join(f"<{(t := tags[i > 0])}>{escape(cell)}</{t}>" for i, cell in enumerate(cells)) + "</tr>"

    body = "".join(row(cells, ("th", "td")) for cells in part.rows)
    return (f'<section class="card"><h2>{escape(part.title)}</h2><table><thead>{row(part.head, ("th", "th"))}</thead>'
            f'<tbody>{body}</tbody></table><p class="note">{escape(part.note)}</p></section>')


def page(plan: dict[str, Any], parts: list[Section]) -> str:
    p, m, t, serve = (plan[k] for k in ("parameters", "memory_per_gpu", "training", "serving"))
    names = {"dense_mlp": "dense feed-forward", "mtp": "MTP module"}
    shares = [(names.get(k, k), p[k], f"{short(p[k])} ({p[k] / p['total']:.1%})")
              for k in ("experts", "attention", "dense_mlp", "embedding", "head", "mtp") if p[k]]
    held = [(k, m[k], short(m[k], "B")) for k in ("weights", "gradients", "optimizer", "activations", "total")]
    own = next(iter(plan["kv_bytes_per_token"].values()))
    total = plan.get("total") or {"dollars": t["dollars"], "seconds": 86400 * t["days"]}
    cache = [(k.removesuffix(f" of {k.rsplit(' ', 1)[-1]}"), v, f"{short(v, 'B')} ({v / own:.1f}x)")
             for k, v in plan["kv_bytes_per_token"].items()]
    curves: dict[Any, tuple[str, Any]] = {}
    for v in serve["on"].values():
        curves.setdefault(v["curve"], (f"{v['devices']} x {v['title']}", v["curve"]))
    keys = [("parameters", short(p["with_router_biases"])), ("active a token", short(p["active"])),
            ("cache a token", short(own, "B")), ("training", f"{money(total['dollars'])}, {duration(total['seconds'] / 86400)}"),
            ("on the fullest GPU", short(m["total"], "B"))]
    body = "".join(f"<div><b>{escape(v)}</b><span class=soft>{escape(k)}</span></div>" for k, v in keys)
    plots = [figure("Parameters by part", bars(shares), "the MTP module is not part of the total" if p["mtp"] else ""),
             figure("Cache per token, bf16", bars(cache), "other kinds of attention at the same layers and heads"),
             figure("Memory of the fullest GPU", bars(held, m["capacity"], f"{short(m['capacity'], 'B')} of {t['title']}"),
                     next(s.note for s in parts if s.title.startswith("Memory"))),
             figure("Tokens per second of all users, by users at once", _curves(list(curves.values())),
                     f"bounds; {serve['context']:,} tokens cached a user; lines end where memory does")]
    small, wide = ([s for s in parts if (len(s.head) > 4) == big] for big in (False, True))
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{escape(plan['name'])}: what it costs</title><style>{STYLE}</style><main><h1>{escape(plan['name'])}</h1>"
            f'<p class="soft">{escape(plan["architecture"])}</p><div class="keys">{body}</div>'
            f'<div class="flow">{"".join(plots)}{"".join(map(table, small))}</div>{"".join(map(table, wide))}</main></html>\n')
